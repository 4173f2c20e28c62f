"""One account's live state, as `recur account ID` prints it.

The command only reads. The state lies in Redis, in the partition of the account's id.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from model.checkpoint import Checkpoint
from model.features.account import WINDOW_DAYS
from model.stepper import sigmoid
from model.units import DAY_MS, DAY_SECONDS, HOUR_SECONDS, MINUTE_SECONDS
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.topics import partition_count
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates, StateCodec
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_store import Load, RedisStateStore
from pipeline.tables import pair_lines

ACCOUNT_HEAD_METRIC = "verdict_auc"
"""Checkpoint metric that only a trained account head has: its area under the ROC curve."""


@dataclass(frozen=True)
class AccountView:
    """An account's state, and its risk.

    Attributes:
        partition: where the state lies; ``expected_partition`` is the one of Kafka's partitioner.
        state: columns of one row.
        size_bytes: size of the value in Redis.
        risk: probability that the account is compromised now, from the account head; None if
            the checkpoint has no trained account head.
        watermark: the partition's watermark when the state was loaded.
    """

    account_id: str
    partition: int
    expected_partition: int
    state: AccountStates
    size_bytes: int
    risk: float | None
    watermark: bytes | None = None


async def load_view(settings: Settings, checkpoint: Checkpoint, account_id: str) -> AccountView:
    """Load the account's live state.

    Raises:
        RecurError: Kafka or Redis does not answer, or there is no readable state.
    """
    location = await locate_state(settings, checkpoint, account_id)
    if location.value is None:
        raise RecurError(
            f"no state of this account for model {checkpoint.digest} in Redis, in none of the "
            f"{location.partitions} partitions of {settings.topic('transactions')}: it made no "
            "transaction since the workers began with this model, or none for "
            f"{settings.state_ttl_days:g} days and longer. See that "
            "RECUR_CHECKPOINT, RECUR_REDIS_KEY_PREFIX and RECUR_REDIS_URL are the workers'"
        )
    codec = StateCodec.of(checkpoint)
    state, loaded, _ = codec.decode([location.value])
    if not loaded.all():
        raise RecurError(
            f"the account's state ({len(location.value)} bytes) is of another format or damaged: "
            "workers take it for absent and start the account from no state at its next transaction"
        )
    return AccountView(
        account_id,
        location.partition,
        location.expected_partition,
        state,
        len(location.value),
        _risk(checkpoint, state),
        location.watermark,
    )


@dataclass(frozen=True)
class StateLocation:
    """The partition of an account's state.

    Attributes:
        partition: where the state lies; the expected one if there is no state.
        expected_partition: the one of Kafka's partitioner.
        partitions: partition count.
        value: the state in Redis, or None.
        watermark: the partition's watermark.
    """

    partition: int
    expected_partition: int
    partitions: int
    value: bytes | None
    watermark: bytes | None


async def locate_state(
    settings: Settings, checkpoint: Checkpoint, account_id: str
) -> StateLocation:
    """Look for the account in every partition: producers may use another partitioner.

    Raises:
        RecurError: Kafka or Redis does not answer, or there is no such topic.
    """
    topic = settings.topic("transactions")
    count = await partition_count(settings, topic)
    if count is None:
        raise RecurError(
            f"there is no topic {topic} at {settings.kafka_bootstrap_servers}, and so no state:"
            " correct RECUR_TRANSACTIONS_TOPIC or RECUR_TOPIC_PREFIX"
        )
    expected = key_partition(account_id.encode(), count)
    store = RedisStateStore.from_settings(settings, checkpoint.digest)
    try:
        replies = await store.load([Load(partition, [account_id]) for partition in range(count)])
    except StoreUnavailableError as error:
        raise RecurError(
            f"Redis does not answer ({error}): start it, or set RECUR_REDIS_URL"
        ) from error
    finally:
        await store.close()
    found = [p for p in (expected, *range(count)) if replies[p].states[0] is not None]
    partition = next(iter(found), expected)
    reply = replies[partition]
    return StateLocation(partition, expected, count, reply.states[0], reply.watermark)


def _risk(checkpoint: Checkpoint, state: AccountStates) -> float | None:
    if ACCOUNT_HEAD_METRIC not in checkpoint.header.metrics:
        return None
    return float(sigmoid(checkpoint.stepper.account_logits(state.hidden))[0])


def describe(view: AccountView, checkpoint: Checkpoint, ttl_days: float) -> Iterator[str]:
    """Yield lines for a person to read."""
    state = view.state
    rows = [
        ("compromised now?", _risk_text(view, checkpoint)),
        *history_rows(state, checkpoint.header.currency),
        ("partition", f"{view.partition}{partition_note(view)}"),
        ("state", f"{view.size_bytes} bytes, of model {checkpoint.digest}"),
    ]
    if silence_ms(state) > ttl_days * DAY_MS:
        rows.append(
            ("", f"silent for over {ttl_days:g} days: its next payment starts it from no state")
        )
    yield f"account {view.account_id}"
    yield from pair_lines(rows)


def history_rows(
    state: AccountStates, currency: str, now_ms: int | None = None
) -> list[tuple[str, str]]:
    """Return the rows that describe a state of one row.

    Args:
        now_ms: time to which the age of the last transaction counts, epoch ms; None: now.
    """
    history = state.history
    counts = history.decayed_count[0]
    means = history.decayed_amount[0] / counts
    windows = " / ".join(f"{days} d" for days in WINDOW_DAYS)
    silence = _duration(silence_ms(state, now_ms))
    before = "ago" if now_ms is None else "before"
    return [
        ("transactions seen", f"{int(history.count[0]):,}"),
        ("last transaction", f"{utc(int(history.last_event_ms[0]))} (event time)"),
        ("received", f"{silence} {before}, {_offset_text(int(state.last_offset[0]))}"),
        ("first one in this state", _offset_text(int(state.first_offset[0]))),
        (f"payments in {windows}", " / ".join(f"{value:.1f}" for value in counts)),
        (f"mean amount in {windows}", " / ".join(f"{m:,.2f}" for m in means) + f" {currency}"),
        ("usual amount", f"{float(history.usual_amount[0]):,.2f} {currency}"),
    ]


def _offset_text(offset: int) -> str:
    """Name the position of a transaction that a state refers to."""
    if offset >= 0:
        return f"offset {offset}"
    return "in another partition, before `recur state repartition`"


def silence_ms(state: AccountStates, now_ms: int | None = None) -> int:
    """Return the time since the last record of a state of one row, milliseconds."""
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    return max(0, now_ms - int(state.last_record_ms[0]))


def _risk_text(view: AccountView, checkpoint: Checkpoint) -> str:
    if view.risk is None:
        return "unknown: this checkpoint has no trained account head"
    answer = "yes" if view.risk >= 0.5 else "no"
    auc = checkpoint.header.metrics[ACCOUNT_HEAD_METRIC]
    return f"{answer}, with probability {view.risk:.3f} (AUC {auc:.3f} on days held out)"


def partition_note(view: AccountView) -> str:
    """Name the expected partition if the state lies in another one; else return nothing."""
    if view.partition == view.expected_partition:
        return ""
    return f" (Kafka's default partitioner gives {view.expected_partition})"


def utc(timestamp_ms: int) -> str:
    """Format a time for a person."""
    return f"{datetime.fromtimestamp(timestamp_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _duration(milliseconds: int) -> str:
    seconds = milliseconds / 1000
    for unit, size in (("days", DAY_SECONDS), ("hours", HOUR_SECONDS), ("minutes", MINUTE_SECONDS)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


async def account_lines(settings: Settings, account_id: str) -> list[str]:
    """Return the output of `recur account ID`.

    Raises:
        RecurError: there is nothing to print; the message says why.
    """
    checkpoint = load_checkpoint(settings)
    view = await load_view(settings, checkpoint, account_id)
    return list(describe(view, checkpoint, settings.state_ttl_days))
