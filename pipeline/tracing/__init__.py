"""Spans of polls, alerts and HTTP requests, trace context in headers, and the way of one transaction."""
