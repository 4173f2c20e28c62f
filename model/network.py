"""The network: embeddings and an input layer, a GRU, and a head on state and input.

:meth:`Network.unroll` runs whole sequences, for training and evaluation. A worker advances accounts
by one transaction each: that is :class:`model.stepper.Stepper`, with the same weights and without
torch. The two agree to 1e-5.

Cells other than the GRU exist only for comparison, and only a GRU runs stepwise.

Shapes: n accounts, T transactions each, I inputs with the category codes last, X input layer,
L layers, H hidden, D head, M units of each rising part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.architecture import SLOPE_LOG_MAX, Architecture
from model.features.spec import payment_columns
from model.merchant_weight import MerchantWeightNetwork

_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


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
    - ``amount`` rises with the inputs of role ``amount``. With ``category_slopes`` each category
      multiplies the slope of each unit by a positive factor, because an amount can be usual in one
      category and a thief's in another;
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
        # Logarithms of the slopes, 0 at the start.
        self.slopes = nn.ModuleList(
            nn.Embedding(codes, a.rising_size, _weight=torch.zeros(codes, a.rising_size))
            for codes, _ in a.embeddings
            if a.category_slopes
        )
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
        self.own = MerchantWeightNetwork(max(1, len(payment_columns(a.roles))))
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

    def empty_hidden(self, n: int) -> Tensor:
        """Return the hidden states [n, L, H] of n accounts without a transaction: zeros."""
        a = self.architecture
        size = a.hidden_size * (2 if a.cell == "lstm" else 1)
        return torch.zeros(n, a.layers, size, device=self.logit.weight.device)

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
        slope = self._slope(inputs)
        if self.recurrent is None:
            return self._logits(None, x, slope), self.empty_hidden(len(x))
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
        return self._logits(earlier, x, slope), after.transpose(0, 1)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return copies of the tensors by name, as :class:`model.stepper.Stepper` takes them."""
        return {name: t.numpy(force=True).copy() for name, t in self.state_dict().items()}

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

    def _slope(self, inputs: Tensor) -> Tensor | None:
        """Return the slopes of the amount's units by category, [..., M]; None: all are 1."""
        slope: Tensor | None = None
        for i, of_codes in enumerate(self.slopes):
            codes = inputs[..., self.architecture.inputs + i].long()
            factor = of_codes(codes).clamp(-SLOPE_LOG_MAX, SLOPE_LOG_MAX).exp()
            slope = factor if slope is None else slope * factor
        return slope

    def _free_weight(self) -> Tensor:
        return self.free_layer.weight * self._free_mask

    def _amount_weight(self) -> Tensor:
        return self.amount_layer.weight.abs() * self._amount_mask

    def _fraud_weight(self) -> Tensor:
        weight = self.fraud_layer.weight
        return weight.abs() * self._fraud_mask + weight * self._ages_mask

    def _logits(self, hidden: Tensor | None, x: Tensor, slope: Tensor | None) -> Tensor:
        """Compute the logits: [..., H], [..., width], [..., M] -> [...]."""
        free = F.relu(F.linear(x, self._free_weight(), self.free_layer.bias))
        joined = free if hidden is None else torch.cat((hidden, free), -1)  # [..., H + X]
        head = self.head(self.dropout(joined))  # [..., D + 2 M]
        rising = torch.cat((self._amount_weight(), self._fraud_weight()))  # [2 M, width]
        context, given = head.split((self.architecture.head_size, len(rising)), -1)
        risen = F.linear(x, rising)
        if slope is not None:
            risen = risen * torch.cat((slope, torch.ones_like(slope)), -1)
        amount, frauds = (given + risen).chunk(2, -1)
        logit = self.logit(F.relu(context))
        logit = logit + F.linear(_rise(amount), self.amount_logit.weight.abs())
        if self._any_fraud is not None:
            share = x[..., self._any_fraud].clamp(0.0, 1.0).unsqueeze(-1)
            logit = logit + share * F.linear(_rise(frauds), self.fraud_logit.weight.abs())
        return cast("Tensor", logit.squeeze(-1))


def _rise(z: Tensor) -> Tensor:
    """Apply rising functions of at least 0: half of them unbounded, half bounded."""
    open_end, closed_end = z.chunk(2, -1)
    return torch.cat((F.relu(open_end), torch.sigmoid(closed_end)), -1)


def _columns(roles: Sequence[str], *wanted: str) -> Tensor:
    # On the CPU even if the network itself is made on the meta device.
    return torch.tensor([float(role in wanted) for role in roles], device="cpu")
