"""Near-duplicates among codes, found in bounded memory.

dedupe         the verb
source_tars    the tars whose codes take part
corpus         their codes, ids and keys in mapped files of a scratch folder
pairs          the pairs within a radius, unit by unit
components     the connected components of the pairs
external_sort  64-bit integers in a scratch file, read back in order
tables         the tables of the artifact
"""
