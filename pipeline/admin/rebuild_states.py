"""``recur state rebuild``: partitions' states are computed again from the log, by the workers.

A partition's watermark is set back to where its log begins, by the same guarded save that workers
use. From then on it is the case that they know: the watermark is not the expected one. Whoever
works on the partition writes nothing more of what it had computed, reads the log from its begin,
and keeps the scores that were published. The states that stand lie past the watermark, and so
count as absent until they are computed again; that they are deleted as well only makes room.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from pipeline.admin.control import send_instruction
from pipeline.admin.wait import until_applied
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError, SettingsError
from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import KafkaScoreLog, ScoreLog
from pipeline.kafka.topics import ensure_topics, group_members
from pipeline.messages.control import LOOK
from pipeline.scoring.recovery import begin_log
from pipeline.scoring.watermark_check import read_watermark
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.state_scan import StateScan
from pipeline.storage.state_store import Load, RedisStateStore, Save, StateStore
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, is_other, log_of
from pipeline.units import DAY_SECONDS

WAIT_SECONDS = float(DAY_SECONDS)
"""A rebuild is waited for as long as a person does."""


@dataclass(frozen=True)
class WatermarksSetBack:
    """A partition whose states are to be computed again.

    Attributes:
        begin: the first offset that its log still has: states are computed from there.
        end: up to where they stood, or up to the log's end where that is before.
        is_new_log: the log is another one than that of the states, and all of them go.
    """

    partition: int
    begin: int
    end: int
    is_new_log: bool = field(default=False, compare=False)


class Rebuild:
    """Sets watermarks back.

    Args:
        topic, scores_topic: full names.
        partitions: partition count of both.
        store, logs: where watermarks are, and where logs begin and end.
        committed: the group's offsets; a log that was cut off has those of its lost end, too.
    """

    def __init__(
        self,
        topic: str,
        scores_topic: str,
        partitions: int,
        store: StateStore,
        logs: ScoreLog,
        committed: Mapping[int, int],
    ) -> None:
        self._topic = topic
        self._scores_topic = scores_topic
        self._partitions = partitions
        self._store = store
        self._logs = logs
        self._committed = committed

    async def look(self, partition: int) -> WatermarksSetBack | None:
        """What would be computed again; None for a partition without a watermark.

        Raises:
            StoreUnavailableError, LogUnavailableError: nothing can be said; ask again.
            StartupError: this version cannot read the watermark.
        """
        found = await self._plan(partition)
        return None if found is None else found[0]

    async def take_back(self, partition: int) -> WatermarksSetBack | None:
        """Set a partition's watermark back to the begin of its log.

        Without a watermark there is nothing to do: a worker begins at the log's begin by itself.

        Raises:
            StoreUnavailableError, LogUnavailableError: nothing can be said; ask again.
            StartupError: this version cannot read the watermark.
        """
        while (found := await self._plan(partition)) is not None:
            plan, standing, watermark = found
            if plan.is_new_log:
                mark = watermark.to_bytes()
                if await begin_log(self._store, partition, standing, mark):
                    return plan
                continue
            save = Save(partition, standing, watermark.to_bytes(), [], [])
            if (await self._store.save([save]))[0]:
                return plan
            # A worker has saved in between: from where it is now.
        return None

    async def _plan(self, partition: int) -> tuple[WatermarksSetBack, bytes, Watermark] | None:
        log_id = await self._logs.topic_id(self._topic) or NO_ID
        scores_log_id = await self._logs.topic_id(self._scores_topic) or NO_ID
        bounds = await self._logs.bounds(self._topic, partition)
        scores = await self._logs.bounds(self._scores_topic, partition)
        (loaded,) = await self._store.load([Load(partition, [])])
        if loaded.watermark is None:
            return None
        standing = read_watermark(self._topic, partition, loaded.watermark)
        bounds_end = max(bounds.end, (await self._logs.bounds(self._topic, partition)).end)
        # A log that ends before the watermark is another one, whatever its id, or lost its end;
        # scores before now are not of what comes in it.
        is_new_log = is_other(standing.log_id, log_id) or standing.next_offset > bounds_end
        is_same_topic = not is_other(standing.scores_log_id, scores_log_id)
        scores_begin = standing.scores_begin if is_same_topic else 0
        if is_new_log:
            scores_begin = scores.end
        end = max(bounds.begin, min(standing.next_offset, bounds_end))
        stale_to = standing.stale_to
        if is_new_log:
            stale_to = max(stale_to, standing.next_offset, self._stale(partition, log_id))
        mark = Watermark(
            self._partitions,
            bounds.begin,
            max(scores.begin, scores_begin),
            secrets.randbits(64),
            log_id,
            scores_log_id,
            scores_begin,
            stale_to,
        )
        plan = WatermarksSetBack(
            partition, bounds.begin, bounds_end if is_new_log else end, is_new_log
        )
        return plan, loaded.watermark, mark

    def _stale(self, partition: int, log_id: bytes) -> int:
        """The committed offset, which may be further than the watermark and of the log before.

        One that tells another log needs no bound. One that tells this log was committed before its
        end was lost.
        """
        committed = self._committed.get(partition, 0)
        return 0 if is_other(log_of(committed), log_id) else committed


async def rebuild_lines(
    settings: Settings,
    partitions: Sequence[int] | None,
    *,
    dry_run: bool,
    wait: bool,
    console: Console,
    new_log: bool = False,
) -> list[str]:
    """What `recur state rebuild` prints, when it is done.

    Args:
        partitions: those to rebuild; None for all.
        new_log: only those whose topic was deleted and made again, labels among them.

    Raises:
        RecurError: it cannot be done; the message says why.
    """
    model = load_checkpoint(settings).digest
    topic = settings.topic("transactions")
    counts = await ensure_topics(settings)
    count = counts["transactions"]
    wrong = [p for p in partitions or () if not 0 <= p < count]
    if wrong:
        raise SettingsError(f"{topic} has the partitions 0 to {count - 1}, and no {wrong[0]}")
    store = RedisStateStore.from_settings(settings, model)
    logs = KafkaScoreLog(settings)
    try:
        await logs.start()
        committed = await committed_offsets(settings)
        rebuild = Rebuild(topic, settings.topic("scores"), count, store, logs, committed)
        await _check_counts(store, topic, count, partitions)
        wanted = list(range(count)) if partitions is None else list(partitions)
        labels: list[int] = []
        if new_log:
            plans = [await rebuild.look(p) for p in wanted]
            wanted = [plan.partition for plan in plans if plan is not None and plan.is_new_log]
            labels = await begin_labels(settings, logs, counts["labels"], dry_run=dry_run)
        act = rebuild.look if dry_run else rebuild.take_back
        before = await _states(settings, model, wanted, False) if new_log else {}
        taken = [item for p in wanted if (item := await act(p)) is not None]
        stood = await _states(settings, model, [item.partition for item in taken], not dry_run)
        stood |= before
        workers = await group_members(settings)
        if not dry_run:  # a worker looks at a partition when a record of it comes
            await send_instruction(settings, LOOK, wanted)
        done = False
        if workers and wait and not dry_run:
            targets = {item.partition: item.end for item in taken}
            done = await until_applied(store, targets, "rebuilding", WAIT_SECONDS, console)
    except (StoreUnavailableError, LogUnavailableError) as error:
        raise RecurError(
            f"the rebuild was cut off ({error}): start it again; what is begun goes on by itself"
        ) from error
    finally:
        await logs.stop()
        await store.close()
    if new_log:
        return list(_describe_new_log(settings, taken, stood, labels, dry_run, bool(workers)))
    return list(_describe(topic, taken, stood, dry_run, workers, done))


async def begin_labels(
    settings: Settings, logs: KafkaScoreLog, partitions: int, *, dry_run: bool
) -> list[int]:
    """Have the labels topic booked from its begin where it is another than the one booked.

    Returns:
        the partitions of which that is so.

    Raises:
        StoreUnavailableError, LogUnavailableError: ask again.
    """
    topic = settings.topic("labels")
    log_id = await logs.topic_id(topic) or NO_ID
    ends = await logs.ends(topic, list(range(partitions)))
    store = RedisMerchantStore.from_settings(settings)
    begun = []
    try:
        for partition in range(partitions):
            known = await store.labels_log(partition, None) or NO_ID
            is_past = await store.recorded_to(partition) > ends[partition]
            if is_past or is_other(known, log_id):
                begun.append(partition)
                if not dry_run:
                    await store.begin_labels_log(partition, log_id)
    finally:
        await store.close()
    return begun


async def _check_counts(
    store: RedisStateStore, topic: str, count: int, partitions: Sequence[int] | None
) -> None:
    """After a change of the partition count one partition alone cannot be rebuilt."""
    for partition, value in (await store.watermarks(count)).items():
        mark = read_watermark(topic, partition, value)
        if mark.partitions != count and partitions is not None:
            raise RecurError(
                f"the states in Redis were written when {topic} had {mark.partitions} partitions,"
                f" and it has {count}: run `recur state rekey`, which moves them, or `recur state"
                " rebuild --all`, with which accounts that lie elsewhere now begin anew"
            )


async def _states(
    settings: Settings, model: str, partitions: Sequence[int], sweep: bool
) -> dict[int, int]:
    """How many states there are, or were deleted, by partition."""
    found = dict.fromkeys(partitions, 0)
    if not found:
        return found
    only = next(iter(found)) if len(found) == 1 else None
    async with StateScan(settings) as scan:
        async for partition, accounts in scan.accounts(model, only):
            if partition in found:
                n = len(accounts)
                found[partition] += await scan.sweep(model, partition, accounts) if sweep else n
    return found


def _describe_new_log(
    settings: Settings,
    taken: Sequence[WatermarksSetBack],
    stood: dict[int, int],
    labels: Sequence[int],
    dry_run: bool,
    workers: bool,
) -> Iterator[str]:
    topic = settings.topic("transactions")
    for item in taken:
        yield (
            f"{topic}-{item.partition}: {stood[item.partition]:,} states of the log before"
            f" {'would go' if dry_run else 'are gone'}, {item.end - item.begin:,} records from"
            f" offset {item.begin} on"
        )
    for partition in labels:
        yield f"{settings.topic('labels')}-{partition}: labels are booked from the log's begin"
    if not taken and not labels:
        yield f"{topic}: the states are of the log that is there; nothing to begin"
    elif dry_run:
        yield "would be begun; nothing is done"
    elif workers:
        yield "the workers compute the states from the new log now"
    else:
        yield "no worker runs: the states are computed from the new log when one starts"


def _describe(
    topic: str,
    taken: Sequence[WatermarksSetBack],
    stood: dict[int, int],
    dry_run: bool,
    workers: int,
    done: bool,
) -> Iterator[str]:
    for item in taken:
        records = f"{item.end - item.begin:,} records from offset {item.begin} on"
        states = f"{stood[item.partition]:,} states"
        yield f"{topic}-{item.partition}: {records}, {states}"
        if item.begin > 0 and not item.is_new_log:
            yield (
                "  retention has deleted what is before: accounts whose history began there keep"
                " only what the log still has; one that is not in the log keeps its state"
            )
    if not taken:
        yield f"{topic}: no partition has states of this model; workers begin at its begin anyway"
    elif dry_run:
        yield "would be computed again; nothing is done"
    elif done:
        yield "computed again; scores that were published stay as they are"
    elif workers:
        yield "the workers compute them again now; recur_consumer_lag_records says how far they are"
    else:
        yield "no worker runs: the states are computed again when one starts"
