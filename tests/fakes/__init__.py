"""Doubles of Kafka and Redis, and helpers that several tests share."""
