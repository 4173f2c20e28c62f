"""The account head: the probability that an account is compromised now (many to one).

The head is linear on the account's last hidden state. It is fitted after the network, when the
hidden states no longer change. An account counts as compromised if one of its transactions of the
last seven days, including the present one, is fraud.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Dataset
from model.network import Network
from model.training.logistic import fit_logistic
from model.training.sequences import UNROLL_ACCOUNTS, Inputs, Sequences, one_core_each
from model.units import DAY_MS

COMPROMISED_DAYS = 7
"""Days after a fraud during which the account counts as compromised."""

EVERY = 8
"""Number of transactions of an account between two applications of the head."""

FIT_MAX = 200_000
"""Most states to which the head is fitted. Above it, a random sample."""

PENALTY = 1e-4

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class SampledStates:
    """Hidden states after some of the transactions of a log.

    Attributes:
        row: [m] rows of these transactions.
        hidden: [m, H] state of the last layer after each of them.
    """

    row: Rows
    hidden: Tensor

    def take(self, chosen: Rows) -> SampledStates:
        """Return the states at these places."""
        return SampledStates(self.row[chosen], self.hidden[torch.from_numpy(chosen)])


def is_compromised(dataset: Dataset, sequences: Sequences) -> NDArray[np.bool_]:
    """Return for each transaction [N] whether its account is compromised, by row of the log.

    Memory: 24 bytes for each transaction.
    """
    row = sequences.row
    times = dataset.timestamp_ms[row]
    never = np.int64(-(2**62))
    fraud_ms = np.where(dataset.is_fraud[row], times, never)
    # The running maximum must not cross accounts: an offset for each keeps them apart.
    account = np.repeat(np.arange(len(sequences.length)), sequences.length)
    span = np.int64(times.max() - times.min() + 1) if len(times) else np.int64(1)
    first = times.min() if len(times) else np.int64(0)
    keyed = np.where(fraud_ms == never, np.int64(-1), fraud_ms - first) + account * span
    latest = np.maximum.accumulate(keyed) - account * span  # under 0: the account had no fraud yet
    compromised = (latest >= 0) & (times - first - latest <= COMPROMISED_DAYS * DAY_MS)
    found = np.empty(len(row), np.bool_)
    found[row] = compromised
    return found


def states_of(network: Network, inputs: Inputs, sequences: Sequences) -> SampledStates:
    """SampledStates after every :data:`EVERY`-th transaction of each account."""
    network.eval()
    groups = np.argsort(-sequences.length, kind="stable")

    def unroll(begin: int) -> list[tuple[Rows, Tensor]]:
        found: list[tuple[Rows, Tensor]] = []
        hidden: Tensor | None = None
        with torch.inference_mode():
            group = groups[begin : begin + UNROLL_ACCOUNTS]
            for position, there in sequences.chunks(group, EVERY):
                before = None if hidden is None else hidden[: len(position)]
                _, hidden = network.unroll(inputs.at(position), before)
                # Shorter accounts were padded, their states are wrong.
                whole = np.flatnonzero(there[:, -1])
                rows = sequences.row[position[whole, -1]]
                found.append((rows, hidden[torch.from_numpy(whole)][:, -1].cpu()))
        return found

    with one_core_each(2) as pool:
        parts = [p for ps in pool.map(unroll, range(0, len(groups), UNROLL_ACCOUNTS)) for p in ps]
    if not parts:
        return SampledStates(np.zeros(0, np.intp), torch.zeros(0, network.architecture.hidden_size))
    return SampledStates(np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def fit_account_head(
    network: Network, states: SampledStates, compromised: NDArray[np.bool_]
) -> None:
    """Fit the account head by logistic regression, in place.

    Args:
        network: its attribute ``verdict`` is the head; checkpoints store it by that name.
        states: m hidden states.
        compromised: [m] the truth of each. If all are equal, the head predicts that class.
    """
    if len(compromised) > FIT_MAX:
        rng = np.random.default_rng(len(compromised))
        chosen = np.sort(rng.choice(len(compromised), FIT_MAX, replace=False))
        states = states.take(chosen)
        compromised = compromised[chosen]
    if not len(compromised):
        return
    hidden = states.hidden.numpy().astype(np.float64)
    share = np.clip(compromised.mean(), 1e-6, 1 - 1e-6)
    start = np.zeros(hidden.shape[1] + 1)
    start[-1] = np.log(share / (1 - share))
    weights = start
    if compromised.any() and not compromised.all():
        weights = fit_logistic(hidden, compromised, start, PENALTY)
    with torch.no_grad():
        network.verdict.weight.copy_(torch.from_numpy(weights[None, :-1]))
        network.verdict.bias.copy_(torch.from_numpy(weights[-1:]))


def account_scores(network: Network, states: SampledStates) -> NDArray[np.float32]:
    """Return the probability [m] that the account is compromised."""
    device = network.verdict.weight.device
    with torch.inference_mode():
        logits = network.account_logit(states.hidden[:, None].to(device))
        return np.asarray(torch.sigmoid(logits).cpu().numpy())
