"""The parts that all HTML pages share.

page      self-contained HTML style     its colours and measures plots     curves and histograms as PNG pictures
thumbnails from the shards
"""
