"""Tests of the running system, on a real broker and Redis."""
