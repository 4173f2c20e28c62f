"""Scoring without Faust: partitions, recovery, micro-batches, labels, metrics."""
