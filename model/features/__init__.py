"""Features of accounts and of merchants."""
