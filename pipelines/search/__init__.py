"""Nearest neighbours in a published index.

search  the verb: queries in, neighbours out
actors  one index searched by several Ray actors
gpu     one index searched by a GPU
"""
