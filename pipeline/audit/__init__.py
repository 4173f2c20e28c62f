"""Recompute states and scores from the log, and compare them with what is stored."""
