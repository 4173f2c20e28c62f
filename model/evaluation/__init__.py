"""Evaluation: networks compared on test days, with plots and a model card."""
