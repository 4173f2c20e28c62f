"""The generator: a GRU that unrolls an account's profile into a history of transactions."""
