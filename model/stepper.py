"""The network in NumPy, for one transaction each of n distinct accounts.

It has the weights of a :class:`model.network.Network` and agrees with its ``unroll`` to 1e-5. It
is the only way in which a worker and ``recur verify`` compute.

NumPy takes the place of torch at every size, because a call costs less, above all on a cold cache,
and tanh is 7 times as fast. CPU of a step with its scores, rounding and merchant weights, on one
core, in torch and here: n = 1: 209 and 44 us, cold 518 and 176; n = 32: 553 and 173; n = 2,000: 9.3
and 9.3 ms. A worker without torch imports 2.4 s less and takes 490 MB less memory.

Shapes: n accounts, I inputs with the category codes last, X input layer, L layers, H hidden,
D head, M units of each rising part; width: numeric inputs and the categories' vectors.

A sigmoid is computed as ``(1 + tanh(z / 2)) / 2``. The half of z is in the weights, where it is
exact. So nothing overflows, and NumPy has vector instructions for tanh.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from model.architecture import SLOPE_LOG_MAX, Architecture
from model.features.merchant import REMEMBERED_WEIGHT, WEIGHT_MAX
from model.features.spec import payment_columns

Float32 = NDArray[np.float32]

ROWS_AT_ONCE = 256
"""Most accounts in one pass: the arrays of a pass fit into a core's cache."""

_ODDS_MAX = np.float32(80.0)
"""Largest logarithm of the odds against the rest; beyond it float32 would be infinite."""

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)


def sigmoid(logits: Float32) -> Float32:
    """Return the probabilities of logits, accurate also where they are tiny."""
    probability: Float32 = np.exp(-np.logaddexp(_ZERO, -logits))
    return probability


class Stepper:
    """The steps of a GRU network.

    Args:
        architecture: sizes of the network.
        weights: its tensors by name; copied.
    """

    def __init__(self, architecture: Architecture, weights: Mapping[str, Float32]) -> None:
        a = self.architecture = architecture
        self._embeddings = [weights[f"embeddings.{i}.weight"] for i in range(len(a.embeddings))]
        self._cells = [
            _Cell(*(weights[f"recurrent.{name}_l{layer}"] for name in _Cell.TENSORS))
            for layer in range(a.layers)
        ]
        self._slopes = [
            _slopes(weights[f"slopes.{i}.weight"])
            for i in range(len(a.embeddings) if a.category_slopes else 0)
        ]
        self._head = _Head(a, weights)
        # To the GRU, to the context, to amount and frauds: [width, 2 X + 2 M].
        self._first = np.concatenate(
            (weights["input_layer.weight"].T, self._head.free, self._head.rising), axis=1
        )
        self._first_bias = np.concatenate(
            (weights["input_layer.bias"], weights["free_layer.bias"], np.zeros(2 * a.rising_size))
        ).astype(np.float32)
        self._weight = _MerchantWeight(a, weights)
        self._verdict, self._verdict_bias = weights["verdict.weight"][0], weights["verdict.bias"]

    def empty_hidden(self, n: int) -> Float32:
        """Return the hidden states [n, L, H] of n accounts without a transaction: zeros."""
        return np.zeros((n, self.architecture.layers, self.architecture.hidden_size), np.float32)

    def step(self, inputs: Float32, hidden: NDArray[np.floating]) -> tuple[Float32, Float32]:
        """Advance n accounts by one transaction each.

        Args:
            inputs: [n, I].
            hidden: [n, L, H] before the transaction; not changed.

        Returns:
            logits: [n].
            hidden: [n, L, H] after the transaction.
        """
        n = len(inputs)
        logits, after = np.empty(n, np.float32), np.empty(hidden.shape, np.float32)
        for start in range(0, n, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            x, below, free, rising = self._first_layers(inputs[part])
            before = hidden[part].astype(np.float32)
            for layer, cell in enumerate(self._cells):
                below = cell.step(below, before[:, layer], after[part, layer])
            logits[part] = self._head.logits(x, free, rising, before[:, -1])
        return logits, after

    def logits(self, inputs: Float32, hidden: NDArray[np.floating]) -> Float32:
        """Return the logits [n] of transactions that are not applied.

        Args:
            inputs: [n, I].
            hidden: [n, L, H] before the transaction.
        """
        x, _, free, rising = self._first_layers(inputs)
        return self._head.logits(x, free, rising, hidden[:, -1].astype(np.float32))

    def merchant_weight(self, inputs: Float32) -> NDArray[np.uint8]:
        """Return the merchant weight of each transaction, if it is fraud: [n, I] -> uint8[n]."""
        return self._weight.of(inputs[:, : self.architecture.inputs])

    def account_logits(self, hidden: NDArray[np.floating]) -> Float32:
        """Return the logits that accounts are compromised, from states: [n, L, H] -> [n]."""
        logits: Float32 = hidden[:, -1].astype(np.float32) @ self._verdict + self._verdict_bias
        return logits

    def _first_layers(self, inputs: Float32) -> tuple[Float32, Float32, Float32, Float32]:
        """Compute what depends on the transaction alone.

        Returns:
            the inputs with vectors [n, width], what the GRU and the context see [n, X] each, and
            the contribution to amount and frauds [n, 2 M].
        """
        size = self.architecture.input_size
        codes = inputs[:, self.architecture.inputs :].astype(np.intp) if self._embeddings else None
        x = inputs if codes is None else self._embedded(inputs, codes)
        first = x @ self._first
        first += self._first_bias
        seen, rising = first[:, : 2 * size], first[:, 2 * size :]
        np.maximum(seen, _ZERO, out=seen)
        if codes is not None:
            for i, slopes in enumerate(self._slopes):
                rising *= slopes[codes[:, i]]
        return x, seen[:, :size], seen[:, size:], rising

    def _embedded(self, inputs: Float32, codes: NDArray[np.intp]) -> Float32:
        """Replace categories by their vectors: [n, I] -> [n, width]."""
        vectors = [vectors_of[codes[:, i]] for i, vectors_of in enumerate(self._embeddings)]
        return np.concatenate((inputs[:, : self.architecture.inputs], *vectors), axis=1)


def _slopes(logarithm: Float32) -> Float32:
    """Return the slopes by code in the order of the rising units, 1 for those of the frauds.

    Args:
        logarithm: [codes, M].

    Returns:
        slopes: [codes, 2 M].
    """
    slopes = np.ones((len(logarithm), 2, 2, logarithm.shape[1] // 2), np.float32)
    factor = np.exp(np.clip(logarithm, -SLOPE_LOG_MAX, SLOPE_LOG_MAX))
    slopes[:, :, 0] = factor.reshape(len(logarithm), 2, -1)  # without an upper bound, with one
    return slopes.reshape(len(logarithm), -1)


class _Cell:
    """A GRU layer; X input from the layer below."""

    TENSORS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(self, w_ih: Float32, w_hh: Float32, b_ih: Float32, b_hh: Float32) -> None:
        size = self._size = w_hh.shape[1]
        gates = slice(2 * size)  # nn.GRU stacks r, z and n
        new = slice(2 * size, None)
        # Gates and n apart: NumPy takes three times as long in a part of each row.
        self._below_gates, self._below_new = w_ih[gates].T * _HALF, w_ih[new].T.copy()  # [X, .]
        self._hidden_gates, self._hidden_new = w_hh[gates].T * _HALF, w_hh[new].T.copy()  # [H, .]
        self._gates_bias = (b_ih[gates] + b_hh[gates]) * _HALF
        self._below_bias, self._hidden_bias = b_ih[new], b_hh[new]

    def step(self, below: Float32, hidden: Float32, after: Float32) -> Float32:
        """Compute ``h' = n + z (h - n)`` with ``n = tanh(W x + r (U h))``.

        Args:
            below: [n, X].
            hidden: [n, H] before.
            after: [n, H], for the result.
        """
        size = self._size
        gates = below @ self._below_gates  # [n, 2 H]
        gates += self._gates_bias
        gates += hidden @ self._hidden_gates
        np.tanh(gates, out=gates)
        gates *= _HALF
        gates += _HALF
        kept = hidden @ self._hidden_new  # [n, H]
        kept += self._hidden_bias
        kept *= gates[:, :size]
        new = below @ self._below_new  # [n, H]
        new += self._below_bias
        new += kept
        np.tanh(new, out=new)
        np.subtract(hidden, new, out=after)
        after *= gates[:, size:]
        after += new
        return after


class _Head:
    """The sum of the three parts of a logit; see :class:`model.network.Network`.

    Its units are the context's, then of amount and frauds those without an upper bound, then those
    with one.

    Attributes:
        free, rising: first layers of the context [width, X], of amount and frauds [width, 2 M].
    """

    def __init__(self, architecture: Architecture, weights: Mapping[str, Float32]) -> None:
        a = architecture
        context, m = a.head_size, a.rising_size
        embedded = sum(size for _, size in a.embeddings)
        role = np.array([*a.roles, *["own"] * embedded])
        amount = np.isin(role, ("amount",))
        frauds = amount | np.isin(role, ("frauds", "any_fraud"))
        ages = role == "fraud_ages"

        self.free = (weights["free_layer.weight"] * np.isin(role, ("own", "merchant"))).T
        of_amount = np.abs(weights["amount_layer.weight"]) * amount
        of_frauds = weights["fraud_layer.weight"]
        of_frauds = np.abs(of_frauds) * frauds + of_frauds * ages
        # Of each part the first half of the units has no bound; see Network._logits.
        order = np.arange(2 * m).reshape(2, 2, m // 2).swapaxes(0, 1).ravel()
        self.rising = np.concatenate((of_amount, of_frauds))[order].T
        order = np.concatenate((np.arange(context), context + order))
        head = weights["head.weight"][order].T
        self._hidden = head[: a.hidden_size].copy()  # [H, D + 2 M]
        self._free = head[a.hidden_size :].copy()  # [X, D + 2 M]
        self._bias: Float32 = weights["head.bias"][order]
        # [D + 2 M, 2]: the first column sums context and amount, the second one frauds.
        out = np.zeros((context + 2 * m, 2), np.float32)
        out[:context, 0] = weights["logit.weight"][0]
        out[context : context + m, 0] = np.abs(weights["amount_logit.weight"][0])
        out[context + m :, 1] = np.abs(weights["fraud_logit.weight"][0])
        self._out: Float32 = out[order]
        bounded = slice(context + m, None)
        for halved in (self._hidden, self._free, self._bias, self._out.T):
            halved[..., bounded] *= _HALF
        self.rising[:, m:] *= _HALF
        self._out_bias = self._out[bounded].sum(axis=0)  # the other half of the sigmoids
        self._out_bias[0] += weights["logit.bias"][0]
        self._context, self._unbounded = context, context + m
        self._any_fraud = a.roles.index("any_fraud") if "any_fraud" in a.roles else None

    def logits(self, x: Float32, free: Float32, rising: Float32, hidden: Float32) -> Float32:
        """Compute the logits: [n, width], [n, X], [n, 2 M], [n, H] -> [n]."""
        head: Float32 = hidden @ self._hidden  # [n, D + 2 M]
        head += free @ self._free
        head += self._bias
        head[:, self._context :] += rising
        unbounded, bounded = head[:, : self._unbounded], head[:, self._unbounded :]
        np.maximum(unbounded, _ZERO, out=unbounded)
        np.tanh(bounded, out=bounded)
        parts: Float32 = head @ self._out  # [n, 2]
        parts += self._out_bias
        logits: Float32 = parts[:, 0]
        if self._any_fraud is not None:
            share = np.minimum(np.maximum(x[:, self._any_fraud], _ZERO), _ONE)
            logits += share * parts[:, 1]
        return logits


class _MerchantWeight:
    """The merchant weight; see :class:`model.merchant_weight.MerchantWeightNetwork`."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Float32]) -> None:
        hidden = weights["own.hidden.weight"]  # [units, P]
        columns = payment_columns(architecture.roles)
        # Zeros for the inputs that are not the payment's: cheaper than to gather columns.
        self._hidden = np.zeros((architecture.inputs, len(hidden)), np.float32)
        self._hidden[columns] = hidden.T[: len(columns)]
        self._hidden_bias = weights["own.hidden.bias"]
        self._explained = weights["own.explained.weight"][0] * _HALF
        self._explained_bias = weights["own.explained.bias"] * _HALF
        # r / p = 1 / (1 + (1 - r) / r s) with the explained risk s = (1 + tanh) / 2
        self._odds = np.exp(np.minimum(-weights["own.rest"], _ODDS_MAX)) * _HALF

    def of(self, inputs: Float32) -> NDArray[np.uint8]:
        """Return the weights of payments: [n, inputs] -> uint8[n]."""
        units = inputs @ self._hidden
        units += self._hidden_bias
        np.maximum(units, _ZERO, out=units)
        explained = units @ self._explained
        explained += self._explained_bias
        np.tanh(explained, out=explained)
        explained += _ONE
        explained *= self._odds
        explained += _ONE
        whole: NDArray[np.uint8] = np.rint(np.float32(WEIGHT_MAX) / explained).astype(np.uint8)
        whole[whole > REMEMBERED_WEIGHT] = WEIGHT_MAX
        return whole
