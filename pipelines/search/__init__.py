"""Nearest neighbours in a published index.

search  the verb: queries in, neighbours out
images  the images to search by: files, folders, patterns and URLs
actors  one index searched by several Ray actors
gpu     one index searched by a GPU
"""
