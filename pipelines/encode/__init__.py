"""Turns shards and a model into packed codes in Parquet.

encode         the verb: what is missing is encoded, then published
batch_size     auto, turned into a number
job            what one encode has to do, and what is left of it
workers        many shards on a pool of Ray workers
shard          one encoded shard as bytes
encoder        a model and its forward pass, batch after batch
feed           the batches, decoded by threads or, in process_feed, by processes
decoder        from bytes to squares, and the process that does it
remote_decoder actors on other nodes that decode too
receipts       what was put for a shard, claimed once
codes          codes artifacts, opened
retry_rejects  another go at the rejects of published codes
preflight      what an encode would take, told from two shards
"""
