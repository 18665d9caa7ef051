"""One run in its directory: lock, log, checkpoints, loggers, and how it is resumed."""
