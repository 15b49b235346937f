"""Configuration: one typed tree, built from defaults, a recipe, files and flags.

settings     every setting with its default, bounds and meaning
values       kinds of values that can be written in several ways
loading      builds the tree, and explains errors in it
fingerprint  which settings change a result
recipes      presets of a training
"""
