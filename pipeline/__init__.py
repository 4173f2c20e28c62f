"""The running system: transactions in from Kafka, scores and alerts out, states in Redis."""
