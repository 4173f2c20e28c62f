"""Faults done to the running system on a real broker and Redis; see docs/faults.md."""
