"""Shards to a model.

train        the verb, on Ray Train
batches      which samples train and validate, and the batches of an epoch
prefetch     those batches from a position on, made ahead
learner      the optimiser step and all that a checkpoint must hold
optimizer    how weights move
mixup        batches whose labels lie between 0 and 1
teacher      the frozen network of a distillation
validation   mAP inside training
checkpoints  where a training goes on
rehead       `hhnet train --rotate`: another hash layer for a trained model
"""
