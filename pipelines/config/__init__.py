"""Configuration: one typed tree, built from defaults, a recipe, files and flags.

settings     every setting with its default, bounds and meaning
loading      how the tree comes about, and the errors of those who wrote it
fingerprint  which settings change a result
recipes      presets of a training
"""
