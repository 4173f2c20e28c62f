"""The merchant weight: frauds that the payment explains count little at the merchant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.architecture import MERCHANT_WEIGHT_SIZE
from model.features.merchant import REMEMBERED_WEIGHT, WEIGHT_MAX
from model.merchant_weight import MerchantWeightNetwork
from model.training import merchant_weight_fit
from model.training.merchant_weight_fit import fit_merchant_weight

N = 40_000
Fraud = NDArray[np.bool_]


@pytest.fixture(autouse=True)
def _fewer_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a fifth of a training's updates, because these data are easy."""
    monkeypatch.setattr(merchant_weight_fit, "UPDATES", 800)


def fitted(inputs: Tensor, is_fraud: Fraud, seed: int = 1) -> MerchantWeightNetwork:
    return fit_merchant_weight(
        lambda rows: inputs[torch.from_numpy(rows)], is_fraud, inputs.shape[1], seed
    )


def noise(seed: int, columns: int = 4) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).normal(size=(N, columns)).astype(np.float32)
    )


def test_frauds_that_the_amount_explains_weigh_little_and_the_others_fully() -> None:
    """Half of the frauds are over an amount; the others have any amount."""
    rng = np.random.default_rng(0)
    inputs = noise(0)
    by_amount = inputs[:, 0].numpy() > 2.5
    by_nothing = ~by_amount & (rng.random(N) < by_amount.mean())

    weight = fitted(inputs, by_amount | by_nothing).merchant_weight(inputs)

    assert by_amount.sum() > 150
    # Near the limit of the amount the cause of a fraud is uncertain.
    far_over = inputs[:, 0].numpy() > 2.7
    assert np.mean(weight[far_over] < 0.15 * WEIGHT_MAX) > 0.9
    assert np.mean(weight[by_nothing] == WEIGHT_MAX) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_frauds_that_no_payment_explains_all_count_in_full(rate: float) -> None:
    is_fraud = np.random.default_rng(1).random(N) < rate
    inputs = noise(1)
    weight = fitted(inputs, is_fraud).merchant_weight(inputs)
    assert np.mean(weight[is_fraud] == WEIGHT_MAX) > 0.97


def test_the_same_data_and_seed_give_the_same_network_and_leave_random_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merchant_weight_fit, "UPDATES", 20)
    inputs, is_fraud = noise(2), np.arange(N) % 50 == 0
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (fitted(inputs, is_fraud, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.hidden.weight, other.hidden.weight)


@pytest.mark.parametrize("truth", [False, True])
def test_data_of_one_class_give_finite_weights(
    truth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merchant_weight_fit, "UPDATES", 50)
    inputs = noise(4)
    network = fitted(inputs, np.full(N, truth))
    for parameter in network.parameters():
        assert torch.isfinite(parameter).all()
    assert network.merchant_weight(inputs).shape == (N,)


def test_a_weight_is_the_share_of_the_rest_and_small_ones_are_kept() -> None:
    """The weight is r / p with p = 1 - (1 - r)(1 - s) and logits f and r."""
    network = MerchantWeightNetwork(1)
    with torch.no_grad():
        network.hidden.weight.fill_(1.0)
        network.hidden.bias.fill_(0.0)
        network.explained.weight.fill_(1 / MERCHANT_WEIGHT_SIZE)  # f(x) = max(x, 0) - 8
        network.explained.bias.fill_(-8.0)
        network.rest.fill_(-5.0)
    x = np.array([0.0, 3.0, 5.0, 8.0, 20.0])
    r, s = 1 / (1 + np.exp(5.0)), 1 / (1 + np.exp(8.0 - x))
    exact = r / (1 - (1 - r) * (1 - s)) * WEIGHT_MAX
    found = network.merchant_weight(torch.from_numpy(x.astype(np.float32))[:, None])
    kept = np.round(exact) <= REMEMBERED_WEIGHT
    assert kept.tolist() == [False, False, True, True, True]
    np.testing.assert_array_equal(found, np.where(kept, np.round(exact), WEIGHT_MAX))


def test_amounts_divisible_by_5_cents_cannot_be_recognised() -> None:
    """All frauds have such amounts, as those of stolen cards in the Handbook's data."""
    rng = np.random.default_rng(6)
    cents = rng.integers(100, 20_000, N)
    is_fraud = rng.random(N) < 0.05
    cents = np.where(is_fraud, cents // 5 * 5, cents)
    amount = torch.from_numpy((cents / 100).astype(np.float32))

    def inputs(amount: Tensor) -> Tensor:
        return torch.stack((torch.log1p(amount) - 4.0, (amount - 100.0) / 60.0), 1)

    network = fitted(inputs(amount), is_fraud)
    grid = torch.arange(20, 4000, dtype=torch.float32) * 0.05
    with torch.inference_mode():
        at = network.log_risk(inputs(grid))
        for cent in (0.01, 0.02):
            assert (network.log_risk(inputs(grid + cent)) - at).abs().max() < 0.02
