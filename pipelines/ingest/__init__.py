"""Images to shards: what a source holds, where its labels come from, how it is split.

ingest      the verb
sources     what it reads: folders, archives, tables
folders     files below a folder; zips and found: members of archives
layout      which folder names a class; beside: what lies next to a picture
tables      a CSV or Parquet table; columns, csv_rows, image_rows: its cells and rows; places: where its paths lie
classes     how classes are named and ordered
split       which sample goes to which part
skips       why a file is no sample
adopt       shards that others wrote; foreign: their samples, tarlists: which tars, growth: the next version
protocols/  the splits of the field
"""
