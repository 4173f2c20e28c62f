"""Calibration: scores become probabilities and their order is never reversed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.architecture import Architecture
from model.network import Network
from model.training.calibration import SCALE_RANGE, fold_into_output_layer, platt


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6.0, 6.0), st.floats(1e-3, 100.0))
def test_the_scale_is_over_0_whatever_the_labels_are(
    seed: int, slope: float, spread: float
) -> None:
    """This also holds if frauds have the lower scores, because rising parts must stay rising."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    logits = rng.normal(-2.0, spread, n).astype(np.float32)
    chance = 1 / (1 + np.exp(-np.clip(slope * logits / spread - 1, -50, 50)))
    is_fraud = rng.random(n) < chance
    is_fraud[0], is_fraud[1] = True, False

    scale, shift = platt(logits, is_fraud)

    assert SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]
    assert np.isfinite(shift)


@pytest.mark.parametrize("frauds", [1, 5000])
def test_a_detector_that_is_wrong_is_only_shifted_to_the_share_of_fraud(frauds: int) -> None:
    logits = np.linspace(-6, 6, 10_000).astype(np.float32)
    is_fraud = np.arange(10_000) < frauds  # the lowest scores
    scale, shift = platt(logits, is_fraud)
    assert scale == 1.0
    scores = 1 / (1 + np.exp(-(scale * logits.astype(np.float64) + shift)))
    assert scores.mean() == pytest.approx(frauds / 10_000, rel=1e-3)


@pytest.mark.parametrize("roles", [(), ("own", "amount", "frauds", "any_fraud")])
def test_folding_scales_every_part_of_the_logit(roles: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = Network(Architecture(4, 8, 8, head_size=8, roles=roles)).eval()  # type: ignore[arg-type]
    inputs, hidden = torch.randn(20, 4), torch.randn(20, 1, 8)
    before, _ = network.unroll(inputs[:, None], hidden)
    fold_into_output_layer(network, 2.5, -1.0)
    after, _ = network.unroll(inputs[:, None], hidden)
    torch.testing.assert_close(after, 2.5 * before - 1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_falling_calibration_is_refused(scale: float) -> None:
    network = Network(Architecture(2, 4, 4, head_size=4))
    with pytest.raises(AssertionError, match="would reverse the parts that rise"):
        network.scale_logits(scale, 0.0)
