"""Kafka clients: topics, rights, producers, and readers of partitions and scores."""
