"""Calibration: scores that mean what they say, at no cost for the worker.

Platt's scale and shift of the logit (Platt 1999, without his smoothing of targets, which moves
the mean score) are fitted to labelled transactions that the network was not trained on, and then
folded into the network's last layer.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.gru import Network

ITERATIONS_MAX = 50
SCALE_RANGE = (0.1, 10.0)
"""A scale outside of it is chance, of a few frauds: then only the shift is fitted."""

Float64 = NDArray[np.float64]


def platt(logits: NDArray[np.float32], is_fraud: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and shift of the logits [N] that make the labels [N] most likely; (1, 0) is as is.

    Both classes must be there.

    >>> rng = np.random.default_rng(0)
    >>> truth = rng.normal(-3, 2, 100_000)
    >>> is_fraud = rng.random(100_000) < 1 / (1 + np.exp(-truth))
    >>> scale, shift = platt(((truth + 1) / 2).astype(np.float32), is_fraud)
    >>> abs(scale - 2) < 0.05, abs(shift + 1) < 0.05
    (True, True)
    """
    z = logits.astype(np.float64)
    scale, shift = _newton(z, is_fraud, np.ones(2, np.bool_))
    if not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
        scale, shift = _newton(z, is_fraud, np.array([False, True]))
    return scale, shift


def _newton(
    z: Float64, is_fraud: NDArray[np.bool_], free: NDArray[np.bool_]
) -> tuple[float, float]:
    """Newton's method with halved steps: the loss is convex in scale and shift."""
    ab = np.array([1.0, 0.0])
    features = np.column_stack((z, np.ones_like(z)))

    def loss(at: Float64) -> float:
        y = features @ at
        return float(np.logaddexp(0.0, y).mean() - y[is_fraud].sum() / len(y))

    present = loss(ab)
    for _ in range(ITERATIONS_MAX):
        score = 1 / (1 + np.exp(-np.clip(features @ ab, -700, 700)))
        gradient = features.T @ (score - is_fraud) / len(z)
        curvature = (features * (score * (1 - score))[:, None]).T @ features / len(z)
        gradient, curvature = gradient[free], curvature[np.ix_(free, free)]
        curvature += 1e-12 * np.eye(len(gradient))
        step = np.zeros(2)
        step[free] = -np.linalg.solve(curvature, gradient)
        size = 1.0
        while (after := loss(ab + size * step)) > present and size > 1e-6:
            size /= 2
        if present - after < 1e-12:
            break
        ab, present = ab + size * step, after
    return float(ab[0]), float(ab[1])


def fold(network: Network, scale: float, shift: float) -> None:
    """Makes the network's logits ``scale * logit + shift``, in place."""
    with torch.no_grad():
        network.logit.weight.mul_(scale)
        network.logit.bias.mul_(scale).add_(shift)
