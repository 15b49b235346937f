"""Turns shards and a model into packed codes in Parquet.

encode         the verb: what is missing is encoded, then published
job            what one encode has to do, and what is left of it
workers        many shards on a pool of Ray workers
shard          one shard, without Ray
encoder        a model and its forward pass, with decoding beside it
receipts       what was put for a shard, claimed once
codes          codes artifacts, opened
retry_rejects  another go at the rejects of published codes
preflight      what an encode would take, told from two shards
"""
