"""Near-duplicates among codes, found in bounded memory.

dedupe         the verb
source_tars    the tars whose codes take part
corpus         their codes, ids and keys in mapped files of a scratch folder
pairs          the pairs within a radius, unit by unit
looks          the look of a picture: a perceptual hash and a thumbnail
confirm        which samples of a component the pictures confirm as duplicates
components     the connected components of the pairs, with what confirms them
external_sort  64-bit integers in a scratch file, read back in order
tables         the tables of the artifact
"""
