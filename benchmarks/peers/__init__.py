"""The job of a Recur worker, written by hand with other stream processors."""
