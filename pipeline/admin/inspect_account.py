"""What the live state says of one account: `recur account ID`.

Nothing is written, and the account need not be one that a worker holds: its state lies in Redis,
in the partition that Kafka's default partitioner gives its id.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from model.checkpoint import Checkpoint
from model.features.account import WINDOW_DAYS
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.topics import partition_count
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates, StateCodec
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_store import Load, RedisStateStore
from pipeline.units import DAY_MS, DAY_SECONDS, HOUR_SECONDS, MINUTE_SECONDS

VERDICT_METRIC = "verdict_auc"
"""A checkpoint whose training fitted the verdict says how good it is."""


@dataclass(frozen=True)
class AccountView:
    """One account's state and what it says.

    Attributes:
        partition: where it lies; ``expected_partition`` is where Kafka's partitioner puts it.
        state: columns of one row.
        size_bytes: of the value in Redis.
        verdict: probability that the account is compromised now; None if the checkpoint's
            training fitted no verdict.
        watermark: the partition's, as it stood when the state was loaded.
    """

    account_id: str
    partition: int
    expected_partition: int
    state: AccountStates
    size_bytes: int
    verdict: float | None
    watermark: bytes | None = None


async def look_at(settings: Settings, checkpoint: Checkpoint, account_id: str) -> AccountView:
    """The account's live state.

    Raises:
        RecurError: Kafka or Redis does not answer, or there is no state that can be read.
    """
    place = await find(settings, checkpoint, account_id)
    if place.value is None:
        raise RecurError(
            f"no state of this account for model {checkpoint.digest} in Redis, in none of the "
            f"{place.partitions} partitions of {settings.topic('transactions')}: it made no "
            "transaction since the workers began with this model, or none for "
            f"{settings.state_ttl_days:g} days and longer. See that "
            "RECUR_CHECKPOINT, RECUR_REDIS_KEY_PREFIX and RECUR_REDIS_URL are the workers'"
        )
    architecture = checkpoint.network.architecture
    codec = StateCodec(architecture.layers, architecture.hidden_size)
    state, loaded, _ = codec.decode([place.value])
    if not loaded.all():
        raise RecurError(
            f"the account's state ({len(place.value)} bytes) is of another format or damaged: "
            "workers take it for absent and start the account anew at its next transaction"
        )
    return AccountView(
        account_id,
        place.partition,
        place.expected_partition,
        state,
        len(place.value),
        _verdict(checkpoint, state),
        place.watermark,
    )


@dataclass(frozen=True)
class Place:
    """Where an account's state lies, or would.

    Attributes:
        partition: where it is; the expected one where it is nowhere.
        expected_partition: where Kafka's partitioner puts the account.
        partitions: how many there are.
        value: in Redis.
        watermark: of the partition.
    """

    partition: int
    expected_partition: int
    partitions: int
    value: bytes | None
    watermark: bytes | None


async def find(settings: Settings, checkpoint: Checkpoint, account_id: str) -> Place:
    """Look for the account in every partition: producers may use another partitioner.

    Raises:
        RecurError: Kafka or Redis does not answer, or there is no such topic.
    """
    topic = settings.topic("transactions")
    partitions = await partition_count(settings, topic)
    if partitions is None:
        raise RecurError(
            f"there is no topic {topic} at {settings.kafka_bootstrap_servers}, and so no state:"
            " correct RECUR_TRANSACTIONS_TOPIC or RECUR_TOPIC_PREFIX"
        )
    places = list(range(partitions))
    expected = key_partition(account_id.encode(), partitions)
    store = RedisStateStore.from_settings(settings, checkpoint.digest)
    try:
        replies = await store.load([Load(p, [account_id]) for p in places])
    except StoreUnavailableError as error:
        raise RecurError(
            f"Redis does not answer ({error}): start it, or set RECUR_REDIS_URL"
        ) from error
    finally:
        await store.close()
    found = [p for p in (expected, *places) if replies[p].states[0] is not None]
    partition = next(iter(found), expected)
    reply = replies[partition]
    return Place(partition, expected, partitions, reply.states[0], reply.watermark)


def _verdict(checkpoint: Checkpoint, state: AccountStates) -> float | None:
    if VERDICT_METRIC not in checkpoint.header.metrics:
        return None
    with torch.inference_mode():
        logit = checkpoint.network.verdict_logit(torch.from_numpy(state.hidden).float())
    return float(torch.sigmoid(logit))


def describe(view: AccountView, checkpoint: Checkpoint, ttl_days: float) -> Iterator[str]:
    """Lines for a person to read."""
    state = view.state
    rows = [
        ("compromised now?", _verdict_text(view, checkpoint)),
        *history_rows(state, checkpoint.header.currency),
        ("partition", f"{view.partition}{note_on_partition(view)}"),
        ("state", f"{view.size_bytes} bytes, of model {checkpoint.digest}"),
    ]
    if silent_ms(state) > ttl_days * DAY_MS:
        rows.append(("", f"silent for over {ttl_days:g} days: its next payment starts it anew"))
    yield f"account {view.account_id}"
    yield from table(rows)


def history_rows(
    state: AccountStates, currency: str, now_ms: int | None = None
) -> list[tuple[str, str]]:
    """What a state of one row tells of its account.

    Args:
        now_ms: from when the last transaction is looked back at, epoch milliseconds; None: now.
    """
    history = state.history
    counts = history.decayed_count[0]
    means = history.decayed_amount[0] / counts
    windows = " / ".join(f"{days} d" for days in WINDOW_DAYS)
    silent = _ago(silent_ms(state, now_ms))
    before = "ago" if now_ms is None else "before"
    return [
        ("transactions seen", f"{int(history.count[0]):,}"),
        ("last transaction", f"{utc(int(history.last_event_ms[0]))} (event time)"),
        ("received", f"{silent} {before}, {_place(int(state.last_offset[0]))}"),
        ("first one in this state", _place(int(state.first_offset[0]))),
        (f"payments in {windows}", " / ".join(f"{value:.1f}" for value in counts)),
        (f"mean amount in {windows}", " / ".join(f"{m:,.2f}" for m in means) + f" {currency}"),
        ("usual amount", f"{float(history.usual_amount[0]):,.2f} {currency}"),
    ]


def _place(offset: int) -> str:
    """Where a transaction of a state lies."""
    return f"offset {offset}" if offset >= 0 else "in another partition, before `recur state rekey`"


def silent_ms(state: AccountStates, now_ms: int | None = None) -> int:
    """Since the last record of a state of one row, milliseconds."""
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    return max(0, now_ms - int(state.last_record_ms[0]))


def table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lines of names and texts, the texts under one another."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"  {name:{width}}  {text}"


def _verdict_text(view: AccountView, checkpoint: Checkpoint) -> str:
    if view.verdict is None:
        return "no verdict in this checkpoint"
    answer = "yes" if view.verdict >= 0.5 else "no"
    auc = checkpoint.header.metrics[VERDICT_METRIC]
    return f"{answer}, with probability {view.verdict:.3f} (AUC {auc:.3f} on days held out)"


def note_on_partition(view: AccountView) -> str:
    """That the partition is another than Kafka's partitioner gives."""
    if view.partition == view.expected_partition:
        return ""
    return f" (Kafka's default partitioner gives {view.expected_partition})"


def utc(timestamp_ms: int) -> str:
    """A time for a person."""
    return f"{datetime.fromtimestamp(timestamp_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ago(milliseconds: int) -> str:
    seconds = milliseconds / 1000
    for unit, size in (("days", DAY_SECONDS), ("hours", HOUR_SECONDS), ("minutes", MINUTE_SECONDS)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


async def account_lines(settings: Settings, account_id: str) -> list[str]:
    """What `recur account ID` prints.

    Raises:
        RecurError: there is nothing to print; the message says why.
    """
    checkpoint = load_checkpoint(settings)
    view = await look_at(settings, checkpoint, account_id)
    return list(describe(view, checkpoint, settings.state_ttl_days))
