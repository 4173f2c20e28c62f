"""An account's standing, counts and recent scores, from its state in Redis and the scores topic."""

from __future__ import annotations

import time

import msgspec
import numpy as np

from model.checkpoint import Checkpoint
from model.features.account import WINDOW_DAYS
from model.forecast.answer import DayForecast, day_forecasts
from model.stepper import sigmoid
from pipeline.gateway.score_search import ScoreSearch
from pipeline.kafka.partitioner import key_partition
from pipeline.storage.account_state import AccountStates, StateCodec
from pipeline.storage.state_store import Load, RedisStateStore

ACCOUNT_HEAD_METRIC = "verdict_auc"
"""Checkpoint metric that only a trained account head has."""

RECENT_MAX = 20
"""Most recent scores in an answer."""

FORECAST_DAYS = 7
"""Days of the forecast in an answer."""


class Window(msgspec.Struct, frozen=True):
    """Decayed sums over a window.

    Attributes:
        days: time constant of the decay.
        payments: number of payments.
        mean_amount: in the checkpoint's currency.
    """

    days: float
    payments: float
    mean_amount: float


class Account(msgspec.Struct, frozen=True):
    """An account as its state describes it.

    Attributes:
        compromised: probability that the account is compromised now; None if the checkpoint has no
            account head.
        transactions_seen: number of transactions in the state.
        last_transaction_at: event time of the last one, epoch milliseconds.
        last_received_at: its record's time, epoch milliseconds.
        usual_amount: in the checkpoint's currency.
        partition: partition of the account's transactions.
        recent_scores: newest first, as the scores topic has them.
        forecast: the next seven whole UTC days; None if the checkpoint has no forecast head.
    """

    account_id: str
    model: str
    currency: str
    compromised: float | None
    transactions_seen: int
    last_transaction_at: int
    last_received_at: int
    usual_amount: float
    windows: list[Window]
    partition: int
    recent_scores: list[msgspec.Raw]
    forecast: list[DayForecast] | None = None


class AccountService:
    """Reads of accounts.

    Args:
        checkpoint: the workers'.
        states: their store; it is only read.
        search: reads scores.
        partitions: number of partitions of the transactions topic.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        states: RedisStateStore,
        search: ScoreSearch,
        partitions: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._codec = StateCodec.of(checkpoint)
        self._states = states
        self._search = search
        self._partitions = partitions

    async def read(self, account_id: str) -> Account | None:
        """Return an account; None if it has no state in any partition.

        Raises:
            StoreUnavailableError, LogUnavailableError: Redis or the broker does not answer.
        """
        expected = key_partition(account_id.encode(), self._partitions)
        order = [expected, *(p for p in range(self._partitions) if p != expected)]
        replies = await self._states.load([Load(partition, [account_id]) for partition in order])
        states, loaded, _ = self._codec.decode([reply.states[0] for reply in replies])
        rows = loaded.nonzero()[0]
        if not len(rows):
            return None
        partition = order[int(rows[0])]
        recent = await self._search.recent_of_account(partition, account_id, RECENT_MAX)
        return self._account(account_id, partition, states.take(rows[:1]), recent)

    def _account(
        self, account_id: str, partition: int, state: AccountStates, recent: list[bytes]
    ) -> Account:
        history, header = state.history, self._checkpoint.header
        compromised = None
        if ACCOUNT_HEAD_METRIC in header.metrics:
            logits = self._checkpoint.stepper.account_logits(state.hidden)
            compromised = round(float(sigmoid(logits)[0]), 6)
        counts, amounts = history.decayed_count[0].tolist(), history.decayed_amount[0].tolist()
        return Account(
            account_id,
            self._checkpoint.digest,
            header.currency,
            compromised,
            int(history.count[0]),
            int(history.last_event_ms[0]),
            int(state.last_record_ms[0]),
            round(float(history.usual_amount[0]), 2),
            [
                Window(days, round(count, 3), round(amount / count, 2) if count > 0 else 0.0)
                for days, count, amount in zip(WINDOW_DAYS, counts, amounts, strict=True)
            ],
            partition,
            [msgspec.Raw(value) for value in recent],
            self._forecast(state),
        )

    def _forecast(self, state: AccountStates) -> list[DayForecast] | None:
        forecaster = self._checkpoint.forecaster
        if forecaster is None:
            return None
        now_ms = np.array([time.time_ns() // 1_000_000])
        return day_forecasts(
            forecaster.forecast(state.history, state.hidden, now_ms, FORECAST_DAYS)
        )
