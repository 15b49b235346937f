"""Sharded Hamming indexes: building, changing, publishing through a gate, and reading.

build     `hhnet index build`
base      the version that the next one is made from
update    `hhnet index add | remove | compact`: the next version
publish   `hhnet index publish | rollback | info`
alias     names that stand for a published index
diff      `hhnet plan`: what is new, changed or gone between shards, codes and an index
corpus    the tars, codes and shards that `plan` compares
commands  the commands that it prints
layout    the names of its parts and tables, and what they say
parts     the codes of many shards to an index part, without Ray
keys      key tables, of which only the needed row groups are read
pool      many of them on a pool of Ray workers, measured and carded
gate      what an index must show before it is published
planner   which kind suits these codes, predicted before any work
reader    an index, opened and searched part by part
kinds/    the kinds of parts, one module each
mapped, faiss_io   how kinds read their files
"""
