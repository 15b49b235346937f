"""Proves artifacts from their stored bytes, cleans them up, and follows them while they are made.

verify      the verb
proofs      the proof of each kind; codes, index, model, report, duplicates, study, shards: one module each
findings    what one verification has proven and found wrong
remembered  tars that were proven before
gc          `hhnet gc`: what no version refers to
status/     `hhnet status`: how far the work at a root is
"""
