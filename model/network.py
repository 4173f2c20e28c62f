"""The network: embeddings and an input layer, a GRU, and a head on state and input.

The same parameters run in two ways, which agree to 1e-5. :meth:`Network.step` advances n accounts
by one transaction each, as the worker does. :meth:`Network.unroll` runs whole sequences, for
training and evaluation.

Cells other than the GRU exist only for comparison, and only a GRU runs stepwise.

Shapes: n accounts, T transactions each, I inputs with the category codes last, X input layer,
L layers, H hidden, D head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.features.spec import Role, payment_columns
from model.merchant_weight import MerchantWeightNetwork

SIZE_MAX = 4096
"""Largest size of any layer."""

LAYERS_MAX = 8
"""Most recurrent layers."""

EMBEDDINGS_MAX = 64
"""Most embedded categories."""

VOCABULARY_MAX = 100_000
"""Most codes of one category."""

Cell = Literal["gru", "lstm", "rnn", "none"]
_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a :class:`Network`.

    Attributes:
        inputs: number of numeric inputs; the codes of ``embeddings`` follow them.
        cell: recurrent layer; ``none`` makes a feed-forward network of one transaction.
        embeddings: number of codes and size of the vectors of each category.
        rising_size: units of the part that rises with the amount, and of the part that rises with
            known frauds; even.
        roles: role of each input; empty: all are ``own``.

    Raises:
        ValueError: a size is out of bounds; the message names it.
    """

    inputs: int
    input_size: int = 64
    hidden_size: int = 128
    layers: int = 1
    head_size: int = 64
    dropout: float = 0.1
    cell: Cell = "gru"
    embeddings: tuple[tuple[int, int], ...] = ()
    rising_size: int = 32
    roles: tuple[Role, ...] = ()

    def __post_init__(self) -> None:
        if not self.roles:
            object.__setattr__(self, "roles", ("own",) * self.inputs)
        if len(self.roles) != self.inputs:
            raise ValueError(f"{len(self.roles)} roles for {self.inputs} inputs")
        self._check_sizes()
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

    def _check_sizes(self) -> None:
        for name in ("inputs", "input_size", "hidden_size", "head_size", "rising_size"):
            if not 1 <= getattr(self, name) <= SIZE_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {SIZE_MAX}")
        if self.rising_size % 2:
            raise ValueError(f"rising_size is {self.rising_size}; it must be even")
        if not 1 <= self.layers <= LAYERS_MAX:
            raise ValueError(f"layers is {self.layers}; it must be 1 to {LAYERS_MAX}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be 0 up to, but not, 1")


@dataclass(frozen=True)
class _Cell:
    """Weights of a GRU layer, laid out for one step; H hidden, X input from the layer below.

    One product of [below, hidden] gives the gates r and z. torch.gru_cell computes two products of
    all three gates with twice the temporaries, which do not fit the cache at n = 2,000.
    """

    gates: Tensor  # [X + H, 2 H], r and z
    gates_bias: Tensor  # [2 H]
    new_below: Tensor  # [X, H]
    new_below_bias: Tensor  # [H]
    new_hidden: Tensor  # [H, H]
    new_hidden_bias: Tensor  # [H]

    @classmethod
    def of(cls, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> _Cell:
        """Rearrange the weights of nn.GRU, which stacks the rows of r, z and n."""
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
        """Compute h' = n + z (h - n) with n = tanh(W x + r (U h)): [n, X], [n, H] -> [n, H]."""
        joined = torch.cat((below, hidden), 1)  # [n, X + H]
        r, z = torch.addmm(self.gates_bias, joined, self.gates).sigmoid_().chunk(2, 1)  # [n, H]
        recurrent = torch.addmm(self.new_hidden_bias, hidden, self.new_hidden)  # [n, H]
        new = torch.addmm(self.new_below_bias, below, self.new_below)  # [n, H]
        return torch.lerp(new.addcmul_(r, recurrent).tanh_(), hidden, z)


def _embedding(codes: int, size: int) -> nn.Embedding:
    """Make an nn.Embedding, without random values on the meta device.

    To draw values there, torch would import its compiler, which takes seconds.
    """
    weight = torch.empty(codes, size)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(codes, size, _weight=weight)


class Network(nn.Module):
    """Network for the fraud logit of each transaction, given the account's hidden state.

    The logit is a sum of three parts, each a function of the state before and the transaction:

    - ``context`` uses everything except the amount above usual and the known frauds;
    - ``amount`` rises with the inputs of role ``amount``;
    - ``frauds`` is at least 0, and 0 if no fraud of the merchant is known. It rises with the inputs
      of roles ``amount`` and ``frauds``. Only this part sees the ages of the merchant's frauds.

    For a given history, more money or more known frauds never lower the score. The weights of
    these paths count by their absolute value, and their activations rise (a partially monotone
    network, Runje and Shankaranarayana 2023). The recurrent layer sees all inputs without
    restriction.

    Two attributes keep the names by which checkpoints store their tensors: ``own`` is the merchant
    weight network, ``verdict`` the account head.
    """

    _free_mask: Tensor
    _amount_mask: Tensor
    _fraud_mask: Tensor
    _ages_mask: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.embeddings = nn.ModuleList(_embedding(codes, size) for codes, size in a.embeddings)
        embedded = sum(size for _, size in a.embeddings)
        width = a.inputs + embedded
        self.input_layer = nn.Linear(width, a.input_size)
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
        self.free_layer = nn.Linear(width, a.input_size)
        rising = a.rising_size
        # Rows: the head of the context, then the context's contribution to amount and frauds.
        self.head = nn.Linear(recurrent_size + a.input_size, a.head_size + 2 * rising)
        self.amount_layer = nn.Linear(width, rising, bias=False)
        self.fraud_layer = nn.Linear(width, rising, bias=False)
        self.logit = nn.Linear(a.head_size, 1)
        self.amount_logit = nn.Linear(rising, 1, bias=False)
        self.fraud_logit = nn.Linear(rising, 1, bias=False)
        self._payment_columns = payment_columns(a.roles)
        self.own = MerchantWeightNetwork(max(1, len(self._payment_columns)))
        self.verdict = nn.Linear(a.hidden_size, 1)
        self._roles = a.roles + ("own",) * embedded
        self._any_fraud = a.roles.index("any_fraud") if "any_fraud" in a.roles else None
        free = _columns(self._roles, "own", "merchant")  # [width], 1 or 0
        amount = _columns(self._roles, "amount")
        frauds = _columns(self._roles, "frauds", "any_fraud")
        ages = _columns(self._roles, "fraud_ages")
        self.register_buffer("_free_mask", free, persistent=False)
        self.register_buffer("_amount_mask", amount, persistent=False)
        self.register_buffer("_fraud_mask", amount + frauds, persistent=False)
        self.register_buffer("_ages_mask", ages, persistent=False)
        self._cells: list[_Cell] = []
        self._packed: _Packed | None = None

    def train(self, mode: bool = True) -> Network:
        """Set training or evaluation mode; :meth:`step` uses the weights at this time."""
        self._cells = []
        self._packed = None
        return super().train(mode)

    def empty_hidden(self, n: int) -> Tensor:
        """Return the hidden states [n, L, H] of n accounts without a transaction: zeros."""
        a = self.architecture
        size = a.hidden_size * (2 if a.cell == "lstm" else 1)
        return torch.zeros(n, a.layers, size, device=self.logit.weight.device)

    def step(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Advance n accounts by one transaction each; only for a GRU, without gradients.

        Args:
            inputs: [n, I] float32.
            hidden: [n, L, H] float32 before the transaction; not changed.

        Returns:
            logits: [n].
            hidden: [n, L, H] after the transaction.
        """
        if self._packed is None:
            assert isinstance(self.recurrent, nn.GRU)
            self._cells = [_Cell.of(*weights) for weights in self.recurrent.all_weights]
            self._packed = _Packed.of(self)
        x = self._embedded(inputs)  # [n, width]
        packed, size = self._packed, self.architecture.input_size
        first = torch.addmm(packed.first_bias, x, packed.first)  # [n, 2 X + 2 M]
        shown = first[:, : 2 * size].relu_()
        below = shown[:, :size]
        after = []
        for layer, cell in enumerate(self._cells):
            below = cell.step(below, hidden[:, layer])  # [n, H]
            after.append(below)
        joined = torch.cat((hidden[:, -1], shown[:, size:]), 1)  # [n, H + X]
        head = torch.addmm(packed.head_bias, joined, packed.head)  # [n, D + 2 M]
        head[:, -packed.rising.shape[0] :] += first[:, 2 * size :]
        logits = self._sum(head, packed.context, packed.amount, packed.frauds, x)
        stacked = after[0].unsqueeze(1) if len(after) == 1 else torch.stack(after, 1)
        return logits, stacked  # [n], [n, L, H]

    def unroll(self, inputs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run T transactions of each of n accounts and score each of them (many to many).

        Args:
            inputs: [n, T, I] float32.
            hidden: [n, L, H] before the first. None: new accounts.

        Returns:
            logits: [n, T].
            hidden: [n, L, H] after the last.
        """
        x = self._embedded(inputs)  # [n, T, width]
        if self.recurrent is None:
            return self._logits(None, x), self.empty_hidden(len(x))
        below = F.relu(self.input_layer(x))  # [n, T, X]
        if hidden is None:
            hidden = self.empty_hidden(len(x))
        before = hidden.transpose(0, 1).contiguous()  # [L, n, H]
        if isinstance(self.recurrent, nn.LSTM):
            pair = before.chunk(2, -1)
            outputs, (h, c) = self.recurrent(below, tuple(p.contiguous() for p in pair))
            after = torch.cat((h, c), -1)
            before = pair[0]
        else:
            outputs, after = self.recurrent(below, before)  # [n, T, H], [L, n, H]
        earlier = torch.cat((before[-1].unsqueeze(1), outputs[:, :-1]), 1)  # [n, T, H]
        return self._logits(earlier, x), after.transpose(0, 1)

    def merchant_weight(self, inputs: Tensor) -> NDArray[np.uint8]:
        """Return the merchant weight of each transaction, if it is fraud: [n, I] -> uint8[n]."""
        return self.own.merchant_weight(self.payment_inputs(inputs))

    def payment_inputs(self, inputs: Tensor) -> Tensor:
        """Return the inputs of the payment and its account: [n, I] -> [n, P]."""
        return inputs[:, self._payment_columns]

    def account_logit(self, hidden: Tensor) -> Tensor:
        """Return the logit that an account is compromised, from its state: [n, L, H] -> [n]."""
        return cast("Tensor", self.verdict(hidden[:, -1]).squeeze(-1))

    def scale_logits(self, scale: float, shift: float) -> None:
        """Change logits to ``scale * logit + shift``, in place; the scale must be over 0."""
        assert scale > 0, "a negative scale would reverse the parts that rise"
        with torch.no_grad():
            for layer in (self.logit, self.amount_logit, self.fraud_logit):
                layer.weight.mul_(scale)
            self.logit.bias.mul_(scale).add_(shift)

    def _embedded(self, inputs: Tensor) -> Tensor:
        """Replace categories by their vectors: [..., I] -> [..., width]."""
        if not self.architecture.embeddings:
            return inputs
        numbers = self.architecture.inputs
        codes = inputs[..., numbers:].long()  # [..., categories]
        vectors = [embed(codes[..., i]) for i, embed in enumerate(self.embeddings)]
        return torch.cat((inputs[..., :numbers], *vectors), -1)

    def _free_weight(self) -> Tensor:
        return self.free_layer.weight * self._free_mask

    def _amount_weight(self) -> Tensor:
        return self.amount_layer.weight.abs() * self._amount_mask

    def _fraud_weight(self) -> Tensor:
        weight = self.fraud_layer.weight
        return weight.abs() * self._fraud_mask + weight * self._ages_mask

    def _logits(self, hidden: Tensor | None, x: Tensor) -> Tensor:
        """Compute the logits: [..., H], [..., width] -> [...]."""
        free = F.relu(F.linear(x, self._free_weight(), self.free_layer.bias))
        joined = free if hidden is None else torch.cat((hidden, free), -1)  # [..., H + X]
        head = self.head(self.dropout(joined))  # [..., D + 2 M]
        rising = torch.cat((self._amount_weight(), self._fraud_weight()))  # [2 M, width]
        context, given = head.split((self.architecture.head_size, len(rising)), -1)
        head = torch.cat((context, given + F.linear(x, rising)), -1)
        amount, frauds = self.amount_logit.weight.abs().t(), self.fraud_logit.weight.abs().t()
        return self._sum(head, self.logit.weight.t(), amount, frauds, x)

    def _sum(
        self, head: Tensor, context: Tensor, amount: Tensor, frauds: Tensor, x: Tensor
    ) -> Tensor:
        """Add the three parts: [..., D + 2 M], output weights, [..., width] -> [...]."""
        size, rising = self.architecture.head_size, self.architecture.rising_size
        logit = F.relu(head[..., :size]) @ context + self.logit.bias
        logit = logit + _rise(head[..., size : size + rising]) @ amount
        if self._any_fraud is not None:
            share = x[..., self._any_fraud].clamp(0.0, 1.0).unsqueeze(-1)
            logit = logit + share * (_rise(head[..., size + rising :]) @ frauds)
        return logit.squeeze(-1)


def _rise(z: Tensor) -> Tensor:
    """Apply rising functions of at least 0: half of them unbounded, half bounded."""
    open_end, closed_end = z.chunk(2, -1)
    return torch.cat((F.relu(open_end), torch.sigmoid(closed_end)), -1)


def _columns(roles: Sequence[str], *wanted: str) -> Tensor:
    # On the CPU even if the network itself is made on the meta device.
    return torch.tensor([float(role in wanted) for role in roles], device="cpu")


@dataclass(frozen=True)
class _Packed:
    """Layers around the GRU, laid out for one step."""

    first: Tensor  # [width, 2 X + 2 M]: to the GRU, free, amount, frauds
    first_bias: Tensor
    head: Tensor  # [H + X, D + 2 M]
    head_bias: Tensor
    context: Tensor  # [D, 1]
    amount: Tensor  # [M, 1]
    frauds: Tensor  # [M, 1]
    rising: Tensor  # [2 M]

    @classmethod
    def of(cls, network: Network) -> _Packed:
        """Copy the present weights of the network."""
        with torch.no_grad():
            rising = torch.zeros(2 * network.architecture.rising_size)
            rows = (
                network.input_layer.weight,
                network._free_weight(),
                network._amount_weight(),
                network._fraud_weight(),
            )
            return cls(
                torch.cat(rows).t().contiguous(),
                torch.cat((network.input_layer.bias, network.free_layer.bias, rising)),
                network.head.weight.detach().t().contiguous(),
                network.head.bias.detach(),
                network.logit.weight.detach().t().contiguous(),
                network.amount_logit.weight.abs().t().contiguous(),
                network.fraud_logit.weight.abs().t().contiguous(),
                rising,
            )
