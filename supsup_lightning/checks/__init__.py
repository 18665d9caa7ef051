"""Checks before the first training step: parts that fit together, the Trainer, the network, checkpoints."""
