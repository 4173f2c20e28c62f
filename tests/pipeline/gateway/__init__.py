"""Tests of pipeline/gateway."""
