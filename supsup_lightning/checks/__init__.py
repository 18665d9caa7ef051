"""What is checked before the first step: parts that fit, the Trainer, the network, checkpoints."""
