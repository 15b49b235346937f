"""WebDataset shards: written, read against their index, and decoded.

shards       tars written, and samples read by the index
index        the shard index, in pieces
tar          a strict, bounded reader of tar streams
folders      files below a folder
images       image bytes to pixels
containers/  the containers of image files, walked before anything decodes them
plan         the order of an epoch
"""
