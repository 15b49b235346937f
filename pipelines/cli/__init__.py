"""The command line.

main     the verbs
index    the verbs below `hhnet index`
study    the verb `hhnet study`
verb     what they share: options, errors, exit codes
present  results in words
"""
