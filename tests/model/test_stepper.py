"""The network in NumPy: it computes what the network in torch computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.architecture import Architecture
from model.checkpoint import Checkpoint
from model.features.merchant import WEIGHT_MAX
from model.features.spec import Role, payment_columns
from model.network import Network
from model.stepper import ROWS_AT_ONCE, Float32, Stepper, sigmoid
from pipeline.settings import SHIPPED_CHECKPOINT

INPUTS = 17
ROLES: tuple[Role, ...] = (
    *("own", "amount", "frauds", "fraud_ages", "merchant") * 3,
    *("amount", "any_fraud"),
)
NETWORKS: Sequence[dict[str, Any]] = (
    {},
    {"layers": 3, "hidden_size": 7, "input_size": 5, "head_size": 6, "rising_size": 4},
    {"roles": ROLES},
    {"roles": ("frauds",) * INPUTS},
    {"embeddings": ((5, 3), (9, 2))},
    {"roles": ROLES, "embeddings": ((4, 4),), "layers": 2},
    {"roles": ROLES, "embeddings": ((4, 4), (9, 2)), "category_slopes": True},
    {"roles": ROLES, "category_slopes": True},
)


def network_of(sizes: dict[str, Any]) -> Network:
    torch.manual_seed(3)
    made = Network(Architecture(INPUTS, **sizes)).eval().requires_grad_(False)
    for parameter in made.parameters():  # larger than at the start, as after training
        parameter.mul_(2.0)
    for slopes in made.slopes.parameters():  # they begin at 0; a tenth of them is out of bounds
        slopes.normal_(std=2.5)
    return made


def stepper_of(network: Network) -> Stepper:
    return Stepper(network.architecture, network.weights())


def inputs_of(network: Network, *shape: int) -> Float32:
    """Draw inputs [*shape, I] with codes of each category."""
    rng = np.random.default_rng(4)
    numbers = rng.normal(size=(*shape, network.architecture.inputs))
    codes = [rng.integers(0, n, (*shape, 1)) for n, _ in network.architecture.embeddings]
    return np.concatenate((numbers, *codes), axis=-1).astype(np.float32)


def stepwise(stepper: Stepper, inputs: Float32) -> tuple[Float32, Float32]:
    """Score transactions [n, T, I] of n accounts one after another."""
    hidden, logits = stepper.empty_hidden(len(inputs)), []
    for step in range(inputs.shape[1]):
        logit, hidden = stepper.step(inputs[:, step], hidden)
        logits.append(logit)
    return np.stack(logits, axis=1), hidden


@pytest.mark.parametrize("sizes", NETWORKS)
@pytest.mark.parametrize("n", [1, 33, ROWS_AT_ONCE + 7])
def test_steps_and_the_unrolled_network_agree(sizes: dict[str, Any], n: int) -> None:
    network = network_of(sizes)
    inputs = inputs_of(network, n, 50)
    with torch.inference_mode():
        unrolled, after = network.unroll(torch.from_numpy(inputs))

    logits, hidden = stepwise(stepper_of(network), inputs)

    assert hidden.shape == (n, network.architecture.layers, network.architecture.hidden_size)
    assert logits.dtype == hidden.dtype == np.dtype(np.float32)
    np.testing.assert_allclose(logits, unrolled, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(hidden, after, atol=1e-5, rtol=1e-5)


def test_the_shipped_network_agrees_over_long_histories() -> None:
    """No state grows apart: after 500 steps the difference is that of one."""
    checkpoint = Checkpoint.load(SHIPPED_CHECKPOINT)
    inputs = inputs_of(checkpoint.network, 20, 500)
    with torch.inference_mode():
        unrolled, after = checkpoint.network.unroll(torch.from_numpy(inputs))

    logits, hidden = stepwise(checkpoint.stepper, inputs)

    np.testing.assert_allclose(sigmoid(logits), torch.sigmoid(unrolled), atol=1e-5)
    np.testing.assert_allclose(hidden, after, atol=1e-5)


@pytest.mark.parametrize("sizes", NETWORKS)
def test_logits_without_a_step_are_those_of_the_step(sizes: dict[str, Any]) -> None:
    network = network_of(sizes)
    stepper, inputs = stepper_of(network), inputs_of(network, 40, 2)
    _, hidden = stepper.step(inputs[:, 0], stepper.empty_hidden(40))
    expected, _ = stepper.step(inputs[:, 1], hidden)

    np.testing.assert_allclose(stepper.logits(inputs[:, 1], hidden), expected, atol=1e-5)


@pytest.mark.parametrize("sizes", NETWORKS)
def test_merchant_weights_and_account_logits_are_those_of_torch(sizes: dict[str, Any]) -> None:
    network = network_of(sizes)
    network.own.rest.fill_(-2.0)
    stepper, inputs = stepper_of(network), inputs_of(network, 500)
    hidden = np.random.default_rng(5).normal(size=stepper.empty_hidden(500).shape)

    weight = stepper.merchant_weight(inputs)

    if "own" in network.architecture.roles:
        payment = torch.from_numpy(inputs[:, payment_columns(network.architecture.roles)])
        expected = network.own.merchant_weight(payment)
        assert len(np.unique(expected)) > 10
        # A weight between two whole numbers may round the other way.
        assert np.isin(np.abs(weight.astype(int) - expected), (0, 1, WEIGHT_MAX - 63)).all()
        assert (weight == expected).mean() > 0.99
    logits = network.account_logit(torch.from_numpy(hidden.astype(np.float32)))
    np.testing.assert_allclose(
        stepper.account_logits(hidden.astype(np.float32)), logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("rest", [-1e30, -100.0, 100.0, 1e30])
def test_a_merchant_weight_is_a_number_whatever_the_rest(rest: float) -> None:
    network = network_of({})
    network.own.rest.fill_(rest)
    network.own.explained.bias.fill_(-1e30)  # the payment explains nothing

    assert (stepper_of(network).merchant_weight(inputs_of(network, 3)) == WEIGHT_MAX).all()


def test_a_step_leaves_the_given_hidden_state_unchanged() -> None:
    network = network_of({"layers": 2, "hidden_size": 8})
    hidden = np.random.default_rng(6).normal(size=(3, 2, 8)).astype(np.float32)
    before = hidden.copy()

    _, after = stepper_of(network).step(inputs_of(network, 3), hidden)

    assert np.array_equal(hidden, before)
    assert not np.array_equal(after, before)


def test_an_account_is_not_changed_by_the_others_in_its_round() -> None:
    network = network_of({})
    stepper, inputs = stepper_of(network), inputs_of(network, 40)
    hidden = np.random.default_rng(7).normal(size=(40, 1, 128)).astype(np.float32)
    together, _ = stepper.step(inputs, hidden)
    inputs[1:], hidden[1:] = 7.0, -1.0

    other_company, _ = stepper.step(inputs, hidden)

    np.testing.assert_allclose(together[0], other_company[0], atol=1e-5, rtol=1e-5)


def test_probabilities_are_accurate_where_they_are_tiny_and_never_overflow() -> None:
    logits = np.array([-3e38, -200.0, -50.0, -12.0, 0.0, 12.0, 200.0, 3e38], np.float32)

    found = sigmoid(logits)

    exact = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-37)
