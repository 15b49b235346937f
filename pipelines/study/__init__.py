"""Studies: grids of trainings with comparable results.

study     the verb
grid      what a TOML file describes, as groups of cells that differ in nothing but the seed
results   the tables of a study artifact
page      its page
forecast  what is left of it: trainings, images, time
*.toml    the studies that come with the package
"""
