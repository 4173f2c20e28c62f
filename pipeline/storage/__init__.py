"""Redis clients: account states, merchant profiles, their bytes and their keys."""
