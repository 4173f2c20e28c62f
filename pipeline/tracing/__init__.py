"""Spans of polls, alerts and HTTP requests, trace context in headers, a transaction's way."""
