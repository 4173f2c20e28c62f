"""Manual commands on states and profiles, one file per command."""
