"""HTTP gateway: scores, labels and alerts for systems that do not speak Kafka."""
