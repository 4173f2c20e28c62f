"""The shapes of docs/recurrent.md: what is unrolled at once is what goes step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.architecture import Architecture
from model.network import Network
from model.training.loop import _Job, _SeedableDropout, _Slice
from tests.model import shapes


@pytest.mark.parametrize("shape", shapes.EQUAL)
def test_unrolled_equals_stepwise(shape: str) -> None:
    assert shapes.EQUAL[shape]() <= 1e-5


def test_the_histories_are_not_trivial() -> None:
    run = shapes.stepwise(shapes.shipped().stepper, shapes.histories())

    assert run.scores.max() > 0.5 > 0.1 > np.median(run.scores)
    assert (np.ptp(run.hidden, axis=0) > 0.01).mean() > 0.9


def test_rounding_between_the_steps_moves_scores_little_but_does_move_them() -> None:
    assert 1e-5 < shapes.rounding() < 1e-2


def test_a_gradient_ends_at_the_first_transaction_of_its_chunk() -> None:
    """The second chunk's gradient is that of a network which begins with the state as given."""
    torch.manual_seed(2)
    network = Network(Architecture(3, hidden_size=8, dropout=0.0))
    inputs, fraud = torch.randn(4, 10, 3), np.eye(4, 10, dtype=np.float32)
    dropout = _SeedableDropout(0.0, whole=False)
    trained = _Slice(network, _Positions(inputs), dropout)

    def gradients(begin: int, end: int) -> dict[str, Tensor]:
        position = np.arange(4)[:, None] * 10 + np.arange(begin, end)
        labels, weight = fraud[:, begin:end], np.ones((4, end - begin), np.bool_)
        result = trained.advance(_Job(position, labels, weight, weight.size, seed=1))
        assert result is not None
        return _named(network, result[1])

    gradients(0, 6)
    found = gradients(6, 10)

    def expected(hidden: Tensor) -> dict[str, Tensor]:
        logits, _ = network.unroll(inputs[:, 6:], hidden)
        loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(fraud[:, 6:]))
        return _named(
            network, torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        )

    _, before = network.unroll(inputs[:, :6])
    torch.testing.assert_close(found, expected(before.detach()))
    whole = expected(before)
    name = "recurrent.weight_hh_l0"
    assert (found[name] - whole[name]).abs().max() > 1e-5


class _Positions:
    """Inputs [n, T, I], account by account."""

    def __init__(self, inputs: Tensor) -> None:
        self._inputs = inputs.flatten(0, 1)

    def at(self, position: NDArray[np.intp]) -> Tensor:
        """Return the inputs at positions."""
        return self._inputs[torch.from_numpy(position)]


def _named(network: Network, gradients: object) -> dict[str, Tensor]:
    """Return the gradients by the names of their parameters, without those that are not used."""
    pairs = zip(network.named_parameters(), gradients, strict=True)  # type: ignore[call-overload]
    return {name: gradient for (name, _), gradient in pairs if gradient is not None}
