"""Labelled transactions on disk, the input of training."""
