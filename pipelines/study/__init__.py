"""Studies: grids of trainings whose results can be compared, described by a TOML file and kept in one artifact.

grid.py       what a file describes, as groups of cells that differ in nothing but the seed
results.py    the tables of a study artifact: its cells, its searches, and their summary over the seeds
*.toml        the studies that come with the package
"""
