"""Protocols of the field: which images of a data set are training, queries and database, as a name stands for it.

the data set's own files -> checked counts -> seeded, stratified draw or official split -> parts, and their digest
"""
