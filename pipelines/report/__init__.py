"""The parts that all HTML pages share.

page      self-contained HTML, from `templates/`
plots     curves and histograms as PNG
pictures  thumbnails from the shards
"""
