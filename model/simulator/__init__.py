"""Simulated transactions: the Handbook's world, and a wider one."""
