"""The network: input layer -> GRU (stacked) -> head on hidden and input.

The same parameters run in two ways that agree to 1e-5: :meth:`Network.step` advances n
accounts by one transaction each (the worker), :meth:`Network.unroll` runs whole sequences
(training and evaluation).

Shapes: n accounts, T transactions each, I inputs, X input layer, L layers, H hidden, D head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SIZE_MAX = 4096
"""Largest size of any layer."""

LAYERS_MAX = 8
"""Most GRU layers."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a :class:`Network`.

    Raises:
        ValueError: a size is out of its bounds; the message names it.
    """

    inputs: int
    input_size: int = 64
    hidden_size: int = 128
    layers: int = 1
    head_size: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("inputs", "input_size", "hidden_size", "head_size"):
            if not 1 <= getattr(self, name) <= SIZE_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {SIZE_MAX}")
        if not 1 <= self.layers <= LAYERS_MAX:
            raise ValueError(f"layers is {self.layers}; it must be 1 to {LAYERS_MAX}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be 0 up to, but not, 1")


@dataclass(frozen=True)
class _Cell:
    """A GRU layer's weights laid out for one step; H hidden, X what comes from below.

    The gates r and z take one product of [below, hidden]; torch.gru_cell takes two products of
    all three gates and twice the temporaries, which at n = 2,000 no longer fit the cache.
    """

    gates: Tensor  # [X + H, 2 H], r and z
    gates_bias: Tensor  # [2 H]
    new_below: Tensor  # [X, H]
    new_below_bias: Tensor  # [H]
    new_hidden: Tensor  # [H, H]
    new_hidden_bias: Tensor  # [H]

    @classmethod
    def of(cls, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> _Cell:
        """From nn.GRU's weights: rows of r, z and n, one under the other."""
        w_ih, w_hh, b_ih, b_hh = (w.detach() for w in (w_ih, w_hh, b_ih, b_hh))
        rz = 2 * w_hh.shape[1]
        return cls(
            torch.cat((w_ih[:rz], w_hh[:rz]), 1).t().contiguous(),
            (b_ih + b_hh)[:rz],
            w_ih[rz:].t().contiguous(),
            b_ih[rz:],
            w_hh[rz:].t().contiguous(),
            b_hh[rz:],
        )

    def step(self, below: Tensor, hidden: Tensor) -> Tensor:
        """[n, X], [n, H] -> [n, H]: h' = n + z (h - n), n = tanh(W x + r (U h))."""
        joined = torch.cat((below, hidden), 1)  # [n, X + H]
        r, z = torch.addmm(self.gates_bias, joined, self.gates).sigmoid_().chunk(2, 1)  # [n, H]
        recurrent = torch.addmm(self.new_hidden_bias, hidden, self.new_hidden)  # [n, H]
        new = torch.addmm(self.new_below_bias, below, self.new_below)  # [n, H]
        return torch.lerp(new.addcmul_(r, recurrent).tanh_(), hidden, z)


class Network(nn.Module):
    """Fraud logits of each transaction, given the account's hidden before it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.input_layer = nn.Linear(a.inputs, a.input_size)
        self.gru = nn.GRU(
            a.input_size,
            a.hidden_size,
            a.layers,
            batch_first=True,
            dropout=a.dropout if a.layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(a.dropout)
        self.head = nn.Linear(a.hidden_size + a.input_size, a.head_size)
        self.logit = nn.Linear(a.head_size, 1)
        self._cells: list[_Cell] = []

    def train(self, mode: bool = True) -> Network:
        """Training or (``eval()``) evaluation; :meth:`step` takes the weights as they are then."""
        self._cells = []
        return super().train(mode)

    def empty_hidden(self, n: int) -> Tensor:
        """Hidden [n, L, H] of n accounts that have made no transaction: zeros."""
        a = self.architecture
        return torch.zeros(n, a.layers, a.hidden_size, device=self.logit.weight.device)

    def step(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One transaction of each of n accounts; no gradients.

        Args:
            inputs: [n, I] float32.
            hidden: [n, L, H] float32 before the transaction; not changed.

        Returns:
            logits: [n].
            hidden: [n, L, H] after the transaction.
        """
        x = F.relu(self.input_layer(inputs))  # [n, X]
        below = x
        after = []
        if not self._cells:
            self._cells = [_Cell.of(*weights) for weights in self.gru.all_weights]
        for layer, cell in enumerate(self._cells):
            below = cell.step(below, hidden[:, layer])  # [n, H]
            after.append(below)
        stacked = after[0].unsqueeze(1) if len(after) == 1 else torch.stack(after, 1)
        return self._logits(below, x), stacked  # [n], [n, L, H]

    def unroll(self, inputs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """T transactions of each of n accounts; every one is scored (many to many).

        Args:
            inputs: [n, T, I] float32.
            hidden: [n, L, H] before the first; none for new accounts.

        Returns:
            logits: [n, T].
            hidden: [n, L, H] after the last.
        """
        x = F.relu(self.input_layer(inputs))  # [n, T, X]
        before = None if hidden is None else hidden.transpose(0, 1).contiguous()  # [L, n, H]
        outputs, after = self.gru(x, before)  # [n, T, H], [L, n, H]
        return self._logits(outputs, x), after.transpose(0, 1)

    def _logits(self, hidden: Tensor, x: Tensor) -> Tensor:
        """[..., H], [..., X] -> [...]."""
        joined = self.dropout(torch.cat((hidden, x), -1))  # [..., H + X]
        return cast("Tensor", self.logit(F.relu(self.head(joined))).squeeze(-1))
