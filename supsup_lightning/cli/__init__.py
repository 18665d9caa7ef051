"""Command line: checks of options, and errors as one message."""
