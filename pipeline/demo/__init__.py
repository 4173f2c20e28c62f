"""`recur demo`: services, workers, a stream of payments, and a live view."""
