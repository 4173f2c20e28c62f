"""Feed transactions and labels to Kafka, and count the scores that come back."""
