"""Near-duplicates among codes: who takes part, how their pairs are found in bounded memory, and what is written.

artifact  the tables of a duplicates artifact
sources   the tars whose codes take part, from codes artifacts and from an index
corpus    their codes, ids and keys in files of a scratch folder, mapped
spool     integers in a file, had back in order
search    the pairs, unit by unit of the samples
groups    the connected components of the pairs
"""
