"""Learning: the optimiser step, the batches of an epoch, validation and checkpoints; no Ray in here."""
