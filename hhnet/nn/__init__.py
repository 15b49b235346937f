"""Networks and what trains them.

model         a backbone and a hash layer, and the two files that a model is kept in
backbones     feature extractors without their classifier; backbone_rules: names and sizes, known without torch
heads         hash layers; rehead, rotation: those that a trained network is given
centres       codes that lie far apart: targets of losses
losses/       one module each
distillation  codes whose neighbours are those of a teacher
flops         the cost of a forward pass
"""
