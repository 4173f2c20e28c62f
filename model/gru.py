"""The network: embeddings, input layer -> GRU (stacked) -> head on hidden and input.

The same parameters run in two ways that agree to 1e-5: :meth:`Network.step` advances n
accounts by one transaction each (the worker), :meth:`Network.unroll` runs whole sequences
(training and evaluation).

Other cells than a GRU are there to compare with; only a GRU runs stepwise.

Shapes: n accounts, T transactions each, I inputs with the category codes last, X input layer,
L layers, H hidden, D head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SIZE_MAX = 4096
"""Largest size of any layer."""

LAYERS_MAX = 8
"""Most recurrent layers."""

EMBEDDINGS_MAX = 64
"""Most categories that are embedded."""

VOCABULARY_MAX = 100_000
"""Most codes of one category."""

Cell = Literal["gru", "lstm", "rnn", "none"]
_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a :class:`Network`.

    Attributes:
        inputs: numbers in; the codes of ``embeddings`` come on top of them.
        cell: what is recurrent; ``none`` makes a feed-forward network of one transaction.
        embeddings: for each category its codes and the size of its vectors.

    Raises:
        ValueError: a size is out of its bounds; the message names it.
    """

    inputs: int
    input_size: int = 64
    hidden_size: int = 128
    layers: int = 1
    head_size: int = 64
    dropout: float = 0.1
    cell: Cell = "gru"
    embeddings: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("inputs", "input_size", "hidden_size", "head_size"):
            if not 1 <= getattr(self, name) <= SIZE_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {SIZE_MAX}")
        if not 1 <= self.layers <= LAYERS_MAX:
            raise ValueError(f"layers is {self.layers}; it must be 1 to {LAYERS_MAX}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be 0 up to, but not, 1")
        if self.cell not in (*_CELLS, "none"):
            raise ValueError(f"cell is {self.cell!r}; it must be one of {', '.join(_CELLS)}, none")
        if len(self.embeddings) > EMBEDDINGS_MAX:
            raise ValueError(f"{len(self.embeddings)} embeddings; at most {EMBEDDINGS_MAX}")
        for codes, size in self.embeddings:
            if not (1 <= codes <= VOCABULARY_MAX and 1 <= size <= SIZE_MAX):
                raise ValueError(
                    f"an embedding of {codes} codes in vectors of {size}; at most "
                    f"{VOCABULARY_MAX} and {SIZE_MAX}"
                )


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


def _embedding(codes: int, size: int) -> nn.Embedding:
    """As nn.Embedding makes it; on the meta device without values, for torch imports compiler
    and symbolic algebra to draw none there: that takes seconds."""
    weight = torch.empty(codes, size)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(codes, size, _weight=weight)


class Network(nn.Module):
    """Fraud logits of each transaction, given the account's hidden before it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.embeddings = nn.ModuleList(_embedding(codes, size) for codes, size in a.embeddings)
        embedded = sum(size for _, size in a.embeddings)
        self.input_layer = nn.Linear(a.inputs + embedded, a.input_size)
        self.recurrent: nn.RNNBase | None = None
        if a.cell != "none":
            self.recurrent = _CELLS[a.cell](
                a.input_size,
                a.hidden_size,
                a.layers,
                batch_first=True,
                dropout=a.dropout if a.layers > 1 else 0.0,
            )
        recurrent_size = a.hidden_size if a.cell != "none" else 0
        self.dropout = nn.Dropout(a.dropout)
        self.head = nn.Linear(recurrent_size + a.input_size, a.head_size)
        self.logit = nn.Linear(a.head_size, 1)
        self.verdict = nn.Linear(a.hidden_size, 1)
        self._cells: list[_Cell] = []

    def train(self, mode: bool = True) -> Network:
        """Training or (``eval()``) evaluation; :meth:`step` takes the weights as they are then."""
        self._cells = []
        return super().train(mode)

    def empty_hidden(self, n: int) -> Tensor:
        """Hidden [n, L, H] of n accounts that have made no transaction: zeros."""
        a = self.architecture
        size = a.hidden_size * (2 if a.cell == "lstm" else 1)
        return torch.zeros(n, a.layers, size, device=self.logit.weight.device)

    def step(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One transaction of each of n accounts, by a GRU; no gradients.

        Args:
            inputs: [n, I] float32.
            hidden: [n, L, H] float32 before the transaction; not changed.

        Returns:
            logits: [n].
            hidden: [n, L, H] after the transaction.
        """
        x = self._input(inputs)  # [n, X]
        below = x
        after = []
        if not self._cells:
            assert isinstance(self.recurrent, nn.GRU)
            self._cells = [_Cell.of(*weights) for weights in self.recurrent.all_weights]
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
        x = self._input(inputs)  # [n, T, X]
        if self.recurrent is None:
            return self._logits(None, x), self.empty_hidden(len(x))
        before = None if hidden is None else hidden.transpose(0, 1).contiguous()  # [L, n, H]
        if isinstance(self.recurrent, nn.LSTM):
            pair = None if before is None else before.chunk(2, -1)
            outputs, (h, c) = self.recurrent(x, pair and tuple(p.contiguous() for p in pair))
            after = torch.cat((h, c), -1)
        else:
            outputs, after = self.recurrent(x, before)  # [n, T, H], [L, n, H]
        return self._logits(outputs, x), after.transpose(0, 1)

    def verdict_logit(self, hidden: Tensor) -> Tensor:
        """[n, L, H] -> [n]: the logit that an account is compromised, from its last hidden."""
        return cast("Tensor", self.verdict(hidden[:, -1]).squeeze(-1))

    def _input(self, inputs: Tensor) -> Tensor:
        """[..., I] -> [..., X]."""
        if self.architecture.embeddings:
            numbers = self.architecture.inputs
            codes = inputs[..., numbers:].long()  # [..., categories]
            vectors = [embed(codes[..., i]) for i, embed in enumerate(self.embeddings)]
            inputs = torch.cat((inputs[..., :numbers], *vectors), -1)
        return F.relu(self.input_layer(inputs))

    def _logits(self, hidden: Tensor | None, x: Tensor) -> Tensor:
        """[..., H], [..., X] -> [...]."""
        joined = x if hidden is None else torch.cat((hidden, x), -1)  # [..., H + X]
        return cast("Tensor", self.logit(F.relu(self.head(self.dropout(joined)))).squeeze(-1))
