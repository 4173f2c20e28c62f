"""Benchmarks of the running system on a real broker and Redis: ``python -m benchmarks``."""
