"""JSON in and out: transactions, labels, control records, scores and alerts."""
