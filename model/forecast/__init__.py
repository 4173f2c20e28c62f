"""The forecast of an account's next days: shape of the head, its inputs, and its decoder."""
