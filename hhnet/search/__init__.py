"""Exact Hamming search over packed codes.

kernels      scans; _compiled: their loops
multi_index  multi-index hashing; _buckets: its loops
pairs        all near pairs; _pairs: its loops
device       search in the memory of a GPU; _closer: its kernel
_ranking     the loops of `hhnet.metrics`
"""
