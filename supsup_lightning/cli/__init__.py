"""The command line: options that are checked, and errors as one message."""
