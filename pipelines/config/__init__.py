"""Configuration: one typed tree, built from defaults, a recipe, files and flags.

settings     every setting with its default, bounds and meaning
loading      builds the tree, and explains errors in it
fingerprint  which settings change a result
recipes      presets of a training
"""
