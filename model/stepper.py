"""The network in NumPy, for one transaction each of n distinct accounts.

It has the weights of a :class:`model.network.Network` and agrees with its ``unroll`` to 1e-5.
NumPy costs less than torch at every size (CPU time of one core, shipped checkpoint, caches warm
and cold):

    =======  =============  =============
    n        torch          NumPy
    =======  =============  =============
    =======  =============  =============

Shapes: n accounts, I inputs with the category codes last, width inputs with the categories'
vectors, X input layer, L layers, H hidden, D head, M units of each rising part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.features.merchant import WEIGHT_MAX
from model.merchant_weight import REMEMBERED_WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network

Float32 = NDArray[np.float32]

ROWS_AT_ONCE = 256
"""Most accounts in one pass: what a pass computes then fits into a core's cache."""

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)


def sigmoid(logits: Float32) -> Float32:
    """Return the probabilities of logits [n]; any finite logit has one, without overflow."""
    probability: Float32 = np.exp(-np.logaddexp(_ZERO, -logits))
    return probability


class Stepper:
    """The steps of a network, with its weights at this time.

    Args:
        network: a GRU.
    """

    def __init__(self, network: Network) -> None:
        a = self.architecture = network.architecture
        assert network.recurrent is not None
        self._embeddings = [_array(embedding.weight) for embedding in network.embeddings]
        self._below = _array(network.input_layer.weight.t())  # [width, X]
        self._below_bias = _array(network.input_layer.bias)
        self._cells = [_Cell(*map(_array, weights)) for weights in network.recurrent.all_weights]
        self._head = _Head(network)
        self._weight = _MerchantWeight(network)
        self._payment_width = a.inputs

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
        if n > ROWS_AT_ONCE:
            logits, after = np.empty(n, np.float32), np.empty(hidden.shape, np.float32)
            for start in range(0, n, ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                logits[part], after[part] = self.step(inputs[part], hidden[part])
            return logits, after
        x = self._embedded(inputs)  # [n, width]
        before = hidden.astype(np.float32)
        below = x @ self._below
        below += self._below_bias
        np.maximum(below, _ZERO, out=below)
        after = np.empty(before.shape, np.float32)
        for layer, cell in enumerate(self._cells):
            below = cell.step(below, before[:, layer], after[:, layer])
        return self._head.logits(x, before[:, -1]), after

    def logits(self, inputs: Float32, hidden: NDArray[np.floating]) -> Float32:
        """Return the logits [n] of transactions without advancing the accounts.

        Args:
            inputs: [n, I].
            hidden: [n, L, H] before the transaction.
        """
        return self._head.logits(self._embedded(inputs), hidden[:, -1].astype(np.float32))

    def merchant_weight(self, inputs: Float32) -> NDArray[np.uint8]:
        """Return the merchant weight of each transaction, if it is fraud: [n, I] -> uint8[n]."""
        return self._weight.of(inputs[:, : self.architecture.inputs])

    def _embedded(self, inputs: Float32) -> Float32:
        """Replace categories by their vectors: [n, I] -> [n, width]."""
        if not self._embeddings:
            return inputs
        numbers = self.architecture.inputs
        codes = inputs[:, numbers:].astype(np.intp)
        vectors = [weight[codes[:, i]] for i, weight in enumerate(self._embeddings)]
        return np.concatenate((inputs[:, :numbers], *vectors), axis=1)


class _Cell:
    """A GRU layer; H hidden, X input from the layer below.

    A sigmoid is ``(1 + tanh(z / 2)) / 2``. The half of z is in the weights: that is exact, and
    tanh neither overflows nor needs a division.
    """

    def __init__(self, w_ih: Float32, w_hh: Float32, b_ih: Float32, b_hh: Float32) -> None:
        h = self._size = w_hh.shape[1]
        half = np.ones(3 * h, np.float32)
        half[: 2 * h] = _HALF  # r and z, before n, as nn.GRU stacks them
        self._below = np.ascontiguousarray((w_ih * half[:, None]).T)  # [X, 3 H]
        self._hidden = np.ascontiguousarray((w_hh * half[:, None]).T)  # [H, 3 H]
        self._bias = half * (b_ih + b_hh)  # [3 H]
        self._bias[2 * h :] = b_ih[2 * h :]
        self._new_bias = b_hh[2 * h :]  # [H]

    def step(self, below: Float32, hidden: Float32, after: Float32) -> Float32:
        """Compute ``h' = n + z (h - n)`` with ``n = tanh(W x + r (U h))``.

        Args:
            below: [n, X].
            hidden: [n, H] before.
            after: [n, H], for the result.
        """
        h = self._size
        given = below @ self._below  # [n, 3 H]
        given += self._bias
        kept = hidden @ self._hidden  # [n, 3 H]
        gates, new, recurrent = given[:, : 2 * h], given[:, 2 * h :], kept[:, 2 * h :]
        recurrent += self._new_bias
        gates += kept[:, : 2 * h]
        np.tanh(gates, out=gates)
        gates *= _HALF
        gates += _HALF
        recurrent *= gates[:, :h]
        new += recurrent
        np.tanh(new, out=new)
        np.subtract(hidden, new, out=after)
        after *= gates[:, h:]
        after += new
        return after


class _Head:
    """The sum of the three parts of a logit; see :class:`model.network.Network`.

    Columns: the context, then of amount and frauds the units without a bound, then those with one.
    """

    def __init__(self, network: Network) -> None:
        a = network.architecture
        d, m = a.head_size, a.rising_size
        self._free = _array(network._free_weight().t())  # [width, X]
        self._free_bias = _array(network.free_layer.bias)
        half = m // 2
        # Halves of amount and frauds: without a bound, with one.
        parts = np.arange(d, d + 2 * m).reshape(2, 2, half)
        order = np.concatenate((np.arange(d), parts[:, 0].ravel(), parts[:, 1].ravel()))
        self._open = d + m
        weight, bias = _array(network.head.weight)[order], _array(network.head.bias)[order]
        weight[self._open :] *= _HALF  # see _Cell
        bias[self._open :] *= _HALF
        recurrent = a.hidden_size
        self._by_hidden = np.ascontiguousarray(weight[:, :recurrent].T)  # [H, D + 2 M]
        self._by_free = np.ascontiguousarray(weight[:, recurrent:].T)  # [X, D + 2 M]
        self._bias = bias
        rising = np.concatenate(
            (_array(network._amount_weight()), _array(network._fraud_weight()))
        )  # [2 M, width]
        rising = rising[order[d:] - d]
        rising[m:] *= _HALF
        self._rising = np.ascontiguousarray(rising.T)  # [width, 2 M]
        self._rising_from = d
        # Output weights [D + 2 M, 2]: the first column has the context and the amount.
        out = np.zeros((d + 2 * m, 2), np.float32)
        out[:d, 0] = _array(network.logit.weight)[0]
        out[d : d + m, 0] = np.abs(_array(network.amount_logit.weight)[0])
        out[d + m :, 1] = np.abs(_array(network.fraud_logit.weight)[0])
        out = out[order]
        out[self._open :] *= _HALF  # a sigmoid is (1 + tanh) / 2
        self._out_bias = out[self._open :].sum(axis=0)
        self._out_bias[0] += float(network.logit.bias)
        self._any_fraud = network._any_fraud
        self._out = out if self._any_fraud is not None else np.ascontiguousarray(out[:, :1])

    def logits(self, x: Float32, hidden: Float32) -> Float32:
        """Compute the logits: [n, width], [n, H] -> [n]."""
        free = x @ self._free
        free += self._free_bias
        np.maximum(free, _ZERO, out=free)
        head = hidden @ self._by_hidden  # [n, D + 2 M]
        head += free @ self._by_free
        head += self._bias
        head[:, self._rising_from :] += x @ self._rising
        unbounded, bounded = head[:, : self._open], head[:, self._open :]
        np.maximum(unbounded, _ZERO, out=unbounded)
        np.tanh(bounded, out=bounded)
        parts = head @ self._out  # [n, 2]
        parts += self._out_bias[: parts.shape[1]]
        logits: Float32 = parts[:, 0]
        if self._any_fraud is not None:
            share = np.minimum(np.maximum(x[:, self._any_fraud], _ZERO), _ONE)
            logits = logits + share * parts[:, 1]
        return logits


class _MerchantWeight:
    """The merchant weight; see :class:`model.merchant_weight.MerchantWeightNetwork`."""

    def __init__(self, network: Network) -> None:
        own = network.own
        # Inputs other than those of the payment have zeros: cheaper than to gather columns.
        columns = network._payment_columns
        hidden = _array(own.hidden.weight)  # [units, P]
        self._hidden = np.zeros((network.architecture.inputs, len(hidden)), np.float32)
        self._hidden[columns] = hidden.T[: len(columns)]
        self._hidden_bias = _array(own.hidden.bias)
        self._explained = _array(own.explained.weight)[0] * _HALF  # for tanh, see _Cell
        self._explained_bias = np.float32(float(own.explained.bias) / 2)
        # r / p = 1 / (1 + s (1 - r) / r), with the explained risk s, and r = sigmoid(rest)
        self._odds_half = np.float32(np.exp(-np.float64(float(own.rest))) / 2)

    def of(self, inputs: Float32) -> NDArray[np.uint8]:
        units = inputs @ self._hidden
        units += self._hidden_bias
        np.maximum(units, _ZERO, out=units)
        explained = units @ self._explained
        explained += self._explained_bias
        np.tanh(explained, out=explained)
        explained += _ONE
        explained *= self._odds_half
        explained += _ONE
        whole = np.rint(np.divide(WEIGHT_MAX, explained, dtype=np.float32)).astype(np.uint8)
        whole[whole > REMEMBERED_WEIGHT] = WEIGHT_MAX
        return whole


def _array(weight: Tensor) -> Float32:
    return np.array(weight.detach().cpu().numpy(), np.float32, order="C")
