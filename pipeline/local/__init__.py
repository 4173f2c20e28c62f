"""Local processes: embedded Kafka and Redis, and workers, for demo and tests."""
