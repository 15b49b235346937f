"""Studies: grids of trainings whose results can be compared.

study    the verb
grid     what a TOML file describes, as groups of cells that differ in nothing but the seed
results  the tables of a study artifact
page     its page
*.toml   the studies that come with the package
"""
