"""`recur probe`: sweeps of inputs, and what a thief can take."""
