"""Calibration: scores that are probabilities, without extra work at scoring time.

Platt's scale and shift of the logit (Platt 1999) are fitted to labelled transactions that the
network was not trained on. They are then folded into the output layer. Platt's smoothing of the
targets is left out because it moves the mean score.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.network import Network
from model.training.logistic import fit_logistic

BISECTIONS = 60
SCALE_RANGE = (0.1, 10.0)
"""Plausible scales. A scale outside is chance from few frauds; then only the shift is fitted."""


def platt(logits: NDArray[np.float32], is_fraud: NDArray[np.bool_]) -> tuple[float, float]:
    """Fit the scale and shift of the logits [N] that make the labels [N] most likely.

    Both classes must be present. A scale of 1 and a shift of 0 change nothing.

    >>> rng = np.random.default_rng(0)
    >>> truth = rng.normal(-3, 2, 100_000)
    >>> is_fraud = rng.random(100_000) < 1 / (1 + np.exp(-truth))
    >>> scale, shift = platt(((truth + 1) / 2).astype(np.float32), is_fraud)
    >>> abs(scale - 2) < 0.05, abs(shift + 1) < 0.05
    (True, True)
    """
    z = logits.astype(np.float64)
    scale, shift = fit_logistic(z[:, None], is_fraud, np.array([1.0, 0.0]))
    if not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
        scale, shift = 1.0, _shift(z, is_fraud)
    return float(scale), float(shift)


def _shift(z: NDArray[np.float64], is_fraud: NDArray[np.bool_]) -> float:
    """Find the shift at which the mean score is the share of fraud."""
    low, high = -100.0, 100.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        over = (1 / (1 + np.exp(-np.clip(z + middle, -700, 700)))).mean() > is_fraud.mean()
        low, high = (low, middle) if over else (middle, high)
    return (low + high) / 2


def fold_into_output_layer(network: Network, scale: float, shift: float) -> None:
    """Change the output layer in place so that logits become ``scale * logit + shift``."""
    network.scale_logits(scale, shift)
