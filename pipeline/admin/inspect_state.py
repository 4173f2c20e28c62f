"""An account's state now and at a past time (`recur state show`, `recur state at`).

Both commands only read. A past state is recomputed from the log, as a worker computed it. The
transactions come from their topic; merchants' features come from the scores. The recomputation
ends before the first record that came after the given time. That time is compared with the
records' CreateTime, which Kafka can search; a transaction's own time follows no order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from model.checkpoint import Checkpoint
from model.units import DAY_MS
from pipeline.admin.inspect_account import (
    StateLocation,
    history_rows,
    load_view,
    locate_state,
    partition_note,
    silence_ms,
    utc,
)
from pipeline.audit.account_filter import SingleAccount
from pipeline.audit.recompute import RecomputedPartition
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.partition_reader import KafkaPartitionReader
from pipeline.kafka.topics import topic_ids
from pipeline.progress import Bar
from pipeline.scoring.scorer import scorer_of
from pipeline.scoring.watermark_check import read_watermark
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates
from pipeline.storage.keys import Keys
from pipeline.storage.watermark import Watermark
from pipeline.tables import pair_lines
from pipeline.topic_id import NO_ID, is_other, other_log, shown


async def show_lines(settings: Settings, account_id: str) -> list[str]:
    """Return the output of `recur state show ACCOUNT`.

    Raises:
        RecurError: there is nothing to print; the message says why.
    """
    checkpoint = load_checkpoint(settings)
    view = await load_view(settings, checkpoint, account_id)
    topic = settings.topic("transactions")
    keys = Keys(settings.redis_key_prefix, checkpoint.digest, topic)
    async with KafkaPartitionReader(settings, topic, view.partition) as reader:
        log_end = (await reader.bounds()).end
    log_id = (await topic_ids(settings)).get(topic, NO_ID)
    (key,) = keys.accounts(view.partition, [account_id])
    rows = [
        ("partition", f"{view.partition}{partition_note(view)}"),
        ("key", key.decode()),
        ("state", f"{view.size_bytes} bytes, of model {checkpoint.digest}"),
        *history_rows(view.state, checkpoint.header.currency),
        ("age", _age(view.state, settings.state_ttl_days)),
        (
            "partition's watermark",
            _watermark(topic, view.partition, view.watermark, log_end, log_id),
        ),
    ]
    return [f"account {account_id}", *pair_lines(rows)]


def _age(state: AccountStates, ttl_days: float) -> str:
    days = silence_ms(state) / DAY_MS
    if days > ttl_days:
        return f"{days:.1f} days; over {ttl_days:g}: its next payment starts it from no state"
    return f"{days:.1f} days of the {ttl_days:g} after which it starts from no state"


def _watermark(topic: str, partition: int, value: bytes | None, log_end: int, log_id: bytes) -> str:
    if value is None:
        return "none: workers compute this partition's states from its log again"
    mark = read_watermark(topic, partition, value)
    if is_other(mark.log_id, log_id):
        return (
            f"offset {mark.next_offset} of another {topic} (topic id {shown(mark.log_id)}, now"
            f" {shown(log_id)}): run `recur state rebuild --new-log`"
        )
    waiting = max(0, log_end - mark.next_offset)
    return f"offset {mark.next_offset}, {waiting:,} records before the log's end"


@dataclass(frozen=True)
class PastState:
    """An account's state at a past time.

    Attributes:
        state: columns of one row.
        log_begin, next_offset: offsets [log_begin, next_offset) from which it was recomputed.
        is_complete: whether the log holds the account's history from its begin.
        lacks_features: whether a merchant's features that it depends on are recorded nowhere.
        is_applied: whether the workers have applied the log up to that time.
    """

    partition: int
    state: AccountStates
    log_begin: int
    next_offset: int
    is_complete: bool
    lacks_features: bool
    is_applied: bool


async def state_at(
    settings: Settings, checkpoint: Checkpoint, account_id: str, time_ms: int, bar: Bar
) -> PastState:
    """Recompute the account's state after the records that came up to ``time_ms``.

    Raises:
        RecurError: Kafka or Redis does not answer, or there was no state then.
    """
    location = await locate_state(settings, checkpoint, account_id)
    topic = settings.topic("transactions")
    mark = await _current_watermark(settings, checkpoint, location)
    scorer = scorer_of(settings, checkpoint)
    async with RecomputedPartition(
        settings,
        scorer,
        location.partition,
        SingleAccount(account_id),
        scores_begin=mark.scores_begin,
    ) as log:
        later = await log.first_at(time_ms + 1)
        requested = log.end if later is None else later
        until = min(requested, mark.next_offset)
        begin, is_complete = log.begin, log.is_whole
        async for advanced in log.advance(until):
            if len(advanced.is_complete):
                is_complete = bool(advanced.is_complete[-1])
            done = log.next_offset - begin
            bar.show("computing", done, done / max(1, until - begin))
        row = log.states.row_of.get(account_id)
        value = None if row is None else log.states.values[row]
        state, due, _ = scorer.codec.decode([value])
        if not due.all():
            raise RecurError(
                f"the log of {topic}-{location.partition} has no transaction of this account up to "
                f"then (offsets {begin} to {until}): it had no state, or a history that began "
                "before the log does"
            )
        assert row is not None
        return PastState(
            location.partition,
            state,
            begin,
            until,
            is_complete,
            bool(log.states.lacks_features[row]),
            requested <= mark.next_offset,
        )


async def _current_watermark(
    settings: Settings, checkpoint: Checkpoint, location: StateLocation
) -> Watermark:
    """Return the watermark of the account's partition, which must belong to the current log.

    Raises:
        RecurError: there is none, or it belongs to another log.
    """
    topic = settings.topic("transactions")
    if location.watermark is None:
        raise RecurError(
            f"no worker has applied a record of {topic}-{location.partition} with model "
            f"{checkpoint.digest}: see that RECUR_CHECKPOINT, RECUR_REDIS_KEY_PREFIX and "
            "RECUR_REDIS_URL are the workers'"
        )
    mark = read_watermark(topic, location.partition, location.watermark)
    log_id = (await topic_ids(settings)).get(topic, NO_ID)
    if is_other(mark.log_id, log_id):
        raise other_log(topic, mark.log_id, log_id)
    return mark


def describe_past(
    account_id: str, past: PastState, checkpoint: Checkpoint, time_ms: int
) -> Iterator[str]:
    """Yield lines for a person to read."""
    rows = [
        ("partition", str(past.partition)),
        ("computed from", f"offsets {past.log_begin} to {past.next_offset}"),
        *history_rows(past.state, checkpoint.header.currency, time_ms),
    ]
    if not past.is_complete:
        rows.append(
            ("", "the account's history may have begun before the log: that part is not in it")
        )
    if past.lacks_features:
        rows.append(
            ("", "a score is missing, and with it a merchant's features: not the state as it was")
        )
    if not past.is_applied:
        rows.append(("", "the workers have not reached that time: later records are not in it"))
    yield f"account {account_id} as of {utc(time_ms)} (by records' CreateTime)"
    yield from pair_lines(rows)


def state_at_lines(settings: Settings, account_id: str, time_ms: int) -> list[str]:
    """Return the output of `recur state at ACCOUNT --time T`.

    Raises:
        RecurError: there is nothing to print; the message says why.
    """
    checkpoint = load_checkpoint(settings)
    with Bar(Console(stderr=True, highlight=False)) as bar:
        past = asyncio.run(state_at(settings, checkpoint, account_id, time_ms, bar))
    return list(describe_past(account_id, past, checkpoint, time_ms))
