"""Training: from transactions to a checkpoint."""
