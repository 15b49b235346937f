"""Turns shards into a model.

train          the verb, on Ray Train; job: what its workers have to know, worker: the loop of each
fit            the settings of the recipe auto, by the images and the CPUs
preconditions  checks of its settings before torch or Ray is imported
batches        the samples that train and validate, and the batches of an epoch
device_squares the batches of a GPU that holds the decoded training set
prefetch       the batches from a position on, made ahead of their use
learner        the optimiser step and the state that a checkpoint must hold
optimizer      the optimiser and its learning rate
teacher        the frozen network of a distillation
validation     mAP inside training
curve          loss and mAP by epoch, as parts of the model
sinks          where else the figures go: TensorBoard, MLflow, W&B
pace           what a training says of its pace
checkpoints    saved moments at which a training resumes
rehead         `hhnet train --rotate`: another hash layer for a trained model
"""
