"""`recur probe`: sweeps of inputs, and the exposure to thieves."""
