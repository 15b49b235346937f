"""Exact Hamming search: scans, multi-index hashing, pairs, and the compiled loops behind them."""
