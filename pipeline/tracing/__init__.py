"""Spans of polls and alerts, trace context in headers, and the way of one transaction."""
