"""The command line of `hhnet`.

main       the verbs
flags      the flags of those that have many
index      the verbs below `hhnet index`
study      the verb `hhnet study`
config     the verb `hhnet config`, and what --print-config prints
help       the layout of --help
verb       what they share: options, errors, exit codes
next_step  the command that a user would run next
"""
