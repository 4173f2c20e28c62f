"""The account head: its truth and its fit; and the calibration of scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.architecture import Architecture
from model.data.dataset import Dataset
from model.metrics import auc_roc, expected_calibration_error
from model.network import Network
from model.stepper import Stepper
from model.training.account_head import (
    EVERY,
    SampledStates,
    account_scores,
    fit_account_head,
    is_compromised,
    states_of,
)
from model.training.calibration import fold_into_output_layer, platt
from model.training.sequences import Sequences, TensorInputs
from model.units import DAY_MS

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def dataset(account: list[int], day: list[float], fraud: list[int]) -> Dataset:
    n = len(account)
    return Dataset(
        np.array(account, np.int32),
        np.zeros(n, np.int32),
        np.ones(n),
        (np.array(day) * DAY_MS).astype(np.int64),
        np.array(fraud, np.int8),
        np.zeros(n, np.int8),
    )


def test_an_account_is_compromised_for_seven_days_from_its_own_fraud_on() -> None:
    data = dataset(
        account=[1, 2, 1, 1, 2, 1, 1, 3],
        day=[1, 1, 2, 5, 5, 9, 9.1, 9.2],
        fraud=[0, 0, 1, 0, 0, 0, -1, 0],
    )
    found = is_compromised(data, Sequences(data.account))
    assert found.tolist() == [False, False, True, True, False, True, False, False]


def test_the_truth_of_random_accounts_matches_the_definition() -> None:
    rng = np.random.default_rng(0)
    n = 400
    data = dataset(
        rng.integers(0, 9, n).tolist(),
        np.sort(rng.uniform(0, 90, n)).tolist(),
        (rng.random(n) < 0.06).astype(int).tolist(),
    )
    found = is_compromised(data, Sequences(data.account))
    for i in range(n):
        recent = (data.account[: i + 1] == data.account[i]) & (
            data.timestamp_ms[i] - data.timestamp_ms[: i + 1] <= 7 * DAY_MS
        )
        assert found[i] == data.is_fraud[: i + 1][recent].any()


def test_states_are_those_of_the_stepwise_network() -> None:
    torch.manual_seed(0)
    network = Network(Architecture(inputs=3, input_size=4, hidden_size=5, layers=2)).eval()
    stepper = Stepper(network.architecture, network.weights())
    rng = np.random.default_rng(0)
    account = rng.integers(0, 6, 200)
    inputs = torch.randn(200, 3)
    sequences = Sequences(account)

    states = states_of(network, TensorInputs(inputs, sequences), sequences)

    assert len(states.row) == sum(int((account == a).sum()) // EVERY for a in range(6))
    for row, hidden in zip(states.row[::5], states.hidden[::5], strict=True):
        before = np.flatnonzero(account[: row + 1] == account[row])
        expected = stepper.empty_hidden(1)
        for step in before:
            _, expected = stepper.step(inputs[[step]].numpy(), expected)
        np.testing.assert_allclose(hidden, expected[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_head_is_fitted_to_the_states_whatever_the_share(share: float) -> None:
    rng = np.random.default_rng(0)
    compromised = rng.random(4000) < share
    hidden = torch.randn(4000, 5)
    hidden[torch.from_numpy(compromised), 2] += 2.0
    network = Network(Architecture(inputs=3, hidden_size=5))
    states = SampledStates(np.arange(4000), hidden)

    fit_account_head(network, states, compromised)

    scores = account_scores(network, states)
    assert scores.mean() == pytest.approx(share, abs=0.01)
    if 0 < share < 1:
        assert auc_roc(scores, compromised) > 0.85


def test_folding_a_calibration_calibrates_the_network_itself() -> None:
    torch.manual_seed(0)
    network = Network(Architecture(inputs=4, input_size=8, hidden_size=8, dropout=0.0)).eval()
    inputs = torch.randn(20_000, 1, 4)
    with torch.no_grad():
        network.logit.weight.mul_(40)
        logits = network.unroll(inputs)[0][:, 0].numpy()
        truth = 1 / (1 + np.exp(-(0.4 * logits - 2)))
        is_fraud = np.random.default_rng(0).random(len(truth)) < truth
        scale, shift = platt(logits, is_fraud)
        fold_into_output_layer(network, scale, shift)
        scores = torch.sigmoid(network.unroll(inputs)[0][:, 0]).numpy()
    np.testing.assert_allclose(
        scores, 1 / (1 + np.exp(-(scale * logits + shift))), rtol=1e-3, atol=1e-6
    )
    assert scale == pytest.approx(0.4, abs=0.05)
    assert shift == pytest.approx(-2, abs=0.1)
    assert expected_calibration_error(scores, is_fraud) < 0.01
    assert scores.mean() == pytest.approx(is_fraud.mean(), rel=1e-3)


def test_scores_that_rank_the_wrong_way_round_are_only_shifted() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, 5000).astype(np.float32)
    is_fraud = rng.random(5000) < 1 / (1 + np.exp(logits + 3))
    scale, shift = platt(logits, is_fraud)
    assert scale == 1.0
    assert (1 / (1 + np.exp(-(logits + shift)))).mean() == pytest.approx(is_fraud.mean(), rel=1e-6)


def test_a_perfect_separation_stays_finite() -> None:
    logits = np.linspace(-3, 3, 1000).astype(np.float32)
    scale, shift = platt(logits, logits > 0)
    assert np.isfinite([scale, shift]).all()
    assert 0.1 <= scale <= 10
