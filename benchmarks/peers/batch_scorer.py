"""The hand-written batch that Bytewax and Quix Streams run.

A job decodes the payments with msgspec and reads the states of their accounts with one MGET. The
network advances them in rounds, with the features of the account, by the code that a Recur worker
runs. The job writes the states with one MSET and encodes a score for each payment.

A state is the account's history and its float16 hidden state. The job has no watermarks, no
merchants, no dead letters, no alerts and no features in the score, all of which Recur has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.features.account import (
    ACCOUNT_FEATURES,
    HISTORY_COLUMNS,
    AccountHistory,
    Float32,
    observe,
    rounds_of,
)
from model.stepper import sigmoid


class Payment(msgspec.Struct, frozen=True, gc=False):
    """A transaction in JSON."""

    transaction_id: str
    account_id: str
    amount: float
    timestamp: int


class Score(msgspec.Struct, frozen=True, gc=False):
    """A score in JSON; its source is ``topic:partition:offset`` of the transaction."""

    transaction_id: str
    account_id: str
    score: float
    source: str


class PeerSettings(NamedTuple):
    """Where a job finds its services, topics and network."""

    broker: str
    redis_url: str
    group: str
    transactions: str
    scores: str
    checkpoint: str

    @classmethod
    def read(cls) -> PeerSettings:
        """Read the environment variables that the benchmark sets."""
        return cls(**{name: os.environ[f"PEER_{name.upper()}"] for name in cls._fields})

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a job."""
        return {f"PEER_{name.upper()}": value for name, value in self._asdict().items()}


_decode = msgspec.json.Decoder(Payment).decode
_encode = msgspec.json.Encoder().encode


class PeerNetwork:
    """The network, and the states that it advances: history and float16 hidden state.

    Attributes:
        state: layout of a state in Redis.
        empty: the bytes of a new account's state.
    """

    def __init__(self, settings: PeerSettings) -> None:
        self._checkpoint = Checkpoint.load(Path(settings.checkpoint))
        sizes = self._checkpoint.header.architecture
        empty = AccountHistory.empty(1)
        columns: list[Any] = [
            (name, getattr(empty, name).dtype, getattr(empty, name).shape[1:])
            for name in HISTORY_COLUMNS
        ]
        self.state = np.dtype([*columns, ("hidden", "<f2", (sizes.layers, sizes.hidden_size))])
        self.empty = bytes(self.state.itemsize)
        self._raw_columns = len(self._checkpoint.header.features.names)

    def decode(self, values: Sequence[bytes | None]) -> NDArray[np.void]:
        """Decode the states of n accounts; None is a new one."""
        return np.frombuffer(b"".join([v or self.empty for v in values]), self.state).copy()

    def step(
        self, states: NDArray[np.void], amounts: NDArray[np.float64], times: NDArray[np.int64]
    ) -> tuple[Float32, Float32, NDArray[np.void]]:
        """Advance n distinct accounts: their scores, raw features, and states afterwards."""
        history = AccountHistory(*(states[name] for name in HISTORY_COLUMNS))
        scale = self._checkpoint.header.features.scale
        seen, history = observe(history, amounts, times, scale)
        raw = np.zeros((len(seen), self._raw_columns), np.float32)
        raw[:, : len(ACCOUNT_FEATURES)] = seen
        inputs = self._checkpoint.encode(raw)
        logits, hidden = self._checkpoint.stepper.step(inputs, states["hidden"])
        after = np.empty(len(states), self.state)
        for name in HISTORY_COLUMNS:
            after[name] = getattr(history, name)
        after["hidden"] = hidden
        return sigmoid(logits), raw, after


class BatchScorer:
    """The network, and the states in Redis."""

    def __init__(self, settings: PeerSettings) -> None:
        self._network = PeerNetwork(settings)
        self._prefix = f"{settings.group}:"
        self._redis: Any = redis.Redis.from_url(settings.redis_url)

    def score(self, values: Sequence[bytes], sources: Sequence[str]) -> list[tuple[bytes, bytes]]:
        """Score n payments and save their accounts' states.

        Args:
            values: n payments in JSON, in log order.
            sources: ``topic:partition:offset`` of each.

        Returns:
            key and value of n scores.
        """
        payments = [_decode(value) for value in values]
        rows: dict[str, int] = {}
        row = np.array([rows.setdefault(p.account_id, len(rows)) for p in payments])
        keys = [self._prefix + account for account in rows]
        found = self._redis.mget(keys)
        states = self._network.decode(found)
        amounts = np.array([p.amount for p in payments])
        times = np.array([p.timestamp for p in payments])
        scores = np.empty(len(payments), np.float32)
        for part in rounds_of(row):
            at = row[part]
            scores[part], _, states[at] = self._network.step(states[at], amounts[part], times[part])
        size, saved = states.itemsize, states.tobytes()
        self._redis.mset({key: saved[i * size : (i + 1) * size] for i, key in enumerate(keys)})
        return [
            (
                p.account_id.encode(),
                _encode(Score(p.transaction_id, p.account_id, score, source)),
            )
            for p, score, source in zip(payments, scores.tolist(), sources, strict=True)
        ]
