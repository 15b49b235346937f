"""Artifacts: the results that verbs publish at a root and that later verbs read.

manifest  what an artifact holds, and how it is opened
lists     the lists of parts and receipts of a large artifact
facts     what manifests and receipts say of each kind
commit    the protocol that publishes it
nearby    what lies where an artifact was looked for in vain
differences  how a root that another run began differs
versions  the versions of one root, and which is current
parquet   tables as Parquet, written in one byte form
tables    the Parquet tables of shards, codes and rejects
splits    which part of which split an artifact holds
runs      what was done when and where, outside every digest
result    what a verb returns, as JSON and in words
words     figures, times and tables for people
"""
