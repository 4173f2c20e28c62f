"""Thresholds at which a feature's fraud rate changes sharply: a decision tree of one feature.

A network of smooth units resolves a sharp step (an amount over 220 is fraud) only with long
training. The tree finds such steps in seconds, and each becomes an input of 0 or 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EDGES_MAX = 7
"""Thresholds of one feature."""

LEAF_MIN = 100
"""Transactions on either side of a threshold, within the part that it splits."""

GAIN_MIN_NATS = 10.0
"""Log-likelihood of the training labels that a threshold must gain."""

Float64 = NDArray[np.float64]


def learn_bin_edges(
    values: NDArray[np.float32],
    is_fraud: NDArray[np.bool_],
    edges_max: int = EDGES_MAX,
    leaf_min: int = LEAF_MIN,
    gain_min_nats: float = GAIN_MIN_NATS,
) -> tuple[float, ...]:
    """Thresholds of one feature, ascending; each is a float32, the first value over a step or
    between two.

    Best first: the part whose split gains most log-likelihood is split next. Memory: about 30
    bytes for each value.

    Args:
        values: [N]; NaN: missing, and left out.
        is_fraud: [N].

    >>> values = np.arange(1000, dtype=np.float32)
    >>> learn_bin_edges(values, values >= 700)
    (699.5,)
    """
    there = ~np.isnan(values)
    values, is_fraud = values[there], is_fraud[there]
    if not len(values):
        return ()
    count, frauds, first, last = _runs(values, is_fraud)
    parts = [_best_split(count, frauds, 0, len(first), leaf_min)]
    found: list[int] = []  # runs that begin over a threshold
    while len(found) < edges_max:
        gain, at, begin, end = parts.pop(parts.index(max(parts)))
        if gain < gain_min_nats:
            break
        found.append(at)
        parts.append(_best_split(count, frauds, begin, at, leaf_min))
        parts.append(_best_split(count, frauds, at, end, leaf_min))
    return tuple(sorted(_between(last[at - 1], first[at]) for at in found))


def _runs(
    values: NDArray[np.float32], is_fraud: NDArray[np.bool_]
) -> tuple[Float64, Float64, NDArray[np.float32], NDArray[np.float32]]:
    """Runs of values that the best threshold does not separate (Fayyad and Irani 1992).

    Where that one would make too small a leaf, one within a run may be the best that is allowed; it
    is not looked for.

    Returns:
        count, frauds: [runs + 1] transactions and frauds before each run, and of all.
        first, last: [runs] lowest and highest value of each.
    """
    order = np.argsort(values, kind="stable")
    values, is_fraud = values[order], is_fraud[order]
    begin = np.flatnonzero(np.append(True, values[1:] != values[:-1]))  # of each value
    cumulated = np.concatenate(([0], np.cumsum(is_fraud)))
    end = np.append(begin[1:], len(values))
    frauds = cumulated[end] - cumulated[begin]
    legitimate = (end - begin) - frauds
    pure = (frauds[1:] + frauds[:-1] == 0) | (legitimate[1:] + legitimate[:-1] == 0)
    start = begin[np.concatenate(([True], ~pure))]
    stop = np.append(start[1:], len(values))
    count = np.append(start, len(values)).astype(np.float64)
    return count, cumulated[np.append(start, len(values))], values[start], values[stop - 1]


def _best_split(
    count: Float64, frauds: Float64, begin: int, end: int, leaf_min: int
) -> tuple[float, int, int, int]:
    """The best gain within runs [begin, end), the first run over it, and the part itself."""
    at = np.arange(begin + 1, end)
    at = at[(count[at] - count[begin] >= leaf_min) & (count[end] - count[at] >= leaf_min)]
    if not len(at):
        return 0.0, begin, begin, end
    below = _log_likelihood(frauds[at] - frauds[begin], count[at] - count[begin])
    over = _log_likelihood(frauds[end] - frauds[at], count[end] - count[at])
    whole = _log_likelihood(frauds[[end]] - frauds[[begin]], count[[end]] - count[[begin]])
    gain = below + over - whole
    best = int(np.argmax(gain))
    return float(gain[best]), int(at[best]), begin, end


def _log_likelihood(frauds: Float64, count: Float64) -> Float64:
    """Of the labels of a leaf, at its own fraud rate; nats."""

    def times_log(part: Float64) -> Float64:
        return part * np.log(np.maximum(part, 1) / count)

    return times_log(frauds) + times_log(count - frauds)


def _between(below: np.float32, over: np.float32) -> float:
    """Midway, if there is a float32 midway: else the higher of the two."""
    middle = np.float32((float(below) + float(over)) / 2)
    return float(middle if middle > below else over)
