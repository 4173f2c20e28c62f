"""The command line, `recur`."""
