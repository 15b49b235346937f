"""Proves artifacts from their stored bytes, cleans them up, and follows them while they are made.

verify    the verb, and the list of proofs; codes, index, model, report, duplicates, study, shards: one module each
proofs    what earlier verifications proved, kept beside the artifact
spread    where the reading is done: in this process or on Ray
findings  what one verification has proven and found wrong
rejects   `hhnet rejects`: what was rejected or skipped, with reasons
gc        `hhnet gc`: what no version refers to
status/   `hhnet status`: how far the work at a root is
"""
