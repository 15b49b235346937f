"""Turns images into shards: lists a source, finds its labels, splits it.

ingest      the verb; result: what it returns
sources     opens and lists a source: folder, archive or table; bounds: limits on what it may unfold to
zips        members of a zip
layout      classes from the names of folders; beside: metadata in files next to a picture
tables      a CSV or Parquet table; columns, csv_rows, image_rows: its cells and rows; path_resolver: its files;
            fetch: images at its URLs
classes     names and order of classes
split       the part of each sample; samples: keys, order and tars, planned from the listing
shard       one tar, without Ray; parts: the tars of one artifact; workers: many tars, on Ray or in threads
skips       reasons to skip a file
adopt       shards that others wrote; foreign: their samples, tarlists: the choice of tars, growth: the next version
protocols/  the splits of the field
"""
