"""Manual command: have the workers recompute states from the log (`recur state rebuild`).

The command resets a partition's watermark to the begin of its log, with the conditional write
that workers use. The worker of the partition then finds an unexpected watermark, as after a loss
of data. It drops what it had computed, reads the log from its begin, and keeps the published
scores. Existing states lie past the new watermark, so they count as absent until they are
recomputed. The command deletes them only to free memory.

What happens by itself after a loss is in `pipeline/scoring`; nothing there calls this module.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from model.units import DAY_SECONDS
from pipeline.admin.control import send_control_records
from pipeline.admin.wait import wait_until_applied
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

WAIT_SECONDS = float(DAY_SECONDS)
"""Longest wait for a rebuild: a day, as a person ends the wait with Ctrl-C."""


@dataclass(frozen=True)
class PartitionRebuild:
    """The rebuild of one partition's states.

    Attributes:
        begin: first offset of its log, where the recomputation begins.
        end: the watermark before, or the end of the log if that is smaller.
        is_new_log: whether the topic was recreated, so that no state belongs to its log.
    """

    partition: int
    begin: int
    end: int
    is_new_log: bool = field(default=False, compare=False)


class Rebuild:
    """Resets watermarks to the begin of the log.

    Args:
        topic, scores_topic: full names.
        partitions: partition count of both topics.
        store: holds the watermarks.
        logs: tells offsets and ids of the topics.
        committed: the group's offsets; a log that lost its end has those of the end, too.
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

    async def plan(self, partition: int) -> PartitionRebuild | None:
        """Return what a reset would do; None for a partition without a watermark.

        Raises:
            StoreUnavailableError, LogUnavailableError: no answer; call it again.
            StartupError: this version cannot read the watermark.
        """
        found = await self._plan_watermark(partition)
        return None if found is None else found[0]

    async def reset(self, partition: int) -> PartitionRebuild | None:
        """Reset a partition's watermark to the begin of its log.

        A partition without a watermark needs no reset: a worker begins at the log's begin anyway.

        Raises:
            StoreUnavailableError, LogUnavailableError: no answer; call it again.
            StartupError: this version cannot read the watermark.
        """
        while (found := await self._plan_watermark(partition)) is not None:
            plan, current, watermark = found
            if plan.is_new_log:
                mark = watermark.to_bytes()
                if await begin_log(self._store, partition, current, mark):
                    return plan
                continue
            save = Save(partition, current, watermark.to_bytes(), [], [])
            if (await self._store.save([save]))[0]:
                return plan
            # A worker has saved in between: plan again from its watermark.
        return None

    async def _plan_watermark(
        self, partition: int
    ) -> tuple[PartitionRebuild, bytes, Watermark] | None:
        log_id = await self._logs.topic_id(self._topic) or NO_ID
        scores_log_id = await self._logs.topic_id(self._scores_topic) or NO_ID
        bounds = await self._logs.bounds(self._topic, partition)
        scores = await self._logs.bounds(self._scores_topic, partition)
        (loaded,) = await self._store.load([Load(partition, [])])
        if loaded.watermark is None:
            return None
        current = read_watermark(self._topic, partition, loaded.watermark)
        bounds_end = max(bounds.end, (await self._logs.bounds(self._topic, partition)).end)
        # A log that ends before the watermark is another one or lost its end, whatever its id.
        # Existing scores then belong to none of its future records.
        is_new_log = is_other(current.log_id, log_id) or current.next_offset > bounds_end
        is_same_topic = not is_other(current.scores_log_id, scores_log_id)
        scores_begin = current.scores_begin if is_same_topic else 0
        if is_new_log:
            scores_begin = scores.end
        end = max(bounds.begin, min(current.next_offset, bounds_end))
        stale_to = current.stale_to
        if is_new_log:
            stale_to = max(stale_to, current.next_offset, self._stale(partition, log_id))
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
        plan = PartitionRebuild(
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
    """Run `recur state rebuild`; return its output.

    Args:
        partitions: numbers of the partitions; None for all.
        new_log: rebuild only what belongs to a deleted and recreated topic, labels included.

    Raises:
        RecurError: the states cannot be rebuilt; the message says why.
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
        chosen = list(range(count)) if partitions is None else list(partitions)
        labels: list[int] = []
        if new_log:
            plans = [await rebuild.plan(p) for p in chosen]
            chosen = [plan.partition for plan in plans if plan is not None and plan.is_new_log]
            labels = await restart_labels(settings, logs, counts["labels"], dry_run=dry_run)
        act = rebuild.plan if dry_run else rebuild.reset
        before = await _count_states(settings, model, chosen, False) if new_log else {}
        resets = [item for p in chosen if (item := await act(p)) is not None]
        state_counts = await _count_states(
            settings, model, [item.partition for item in resets], not dry_run
        )
        state_counts |= before
        workers = await group_members(settings)
        if not dry_run:  # a worker reads a watermark only when the partition has a record
            await send_control_records(settings, LOOK, chosen)
        done = False
        if workers and wait and not dry_run:
            targets = {item.partition: item.end for item in resets}
            done = await wait_until_applied(store, targets, "rebuilding", WAIT_SECONDS, console)
    except (StoreUnavailableError, LogUnavailableError) as error:
        raise RecurError(
            f"the rebuild was interrupted ({error}): run the command again; workers go on with the"
            " partitions that are reset"
        ) from error
    finally:
        await logs.stop()
        await store.close()
    if new_log:
        return list(_new_log_lines(settings, resets, state_counts, labels, dry_run, bool(workers)))
    return list(_lines(topic, resets, state_counts, dry_run, workers, done))


async def restart_labels(
    settings: Settings, logs: KafkaScoreLog, partitions: int, *, dry_run: bool
) -> list[int]:
    """Reset the labels' watermarks of partitions whose topic was deleted and recreated.

    Returns:
        numbers of these partitions.

    Raises:
        StoreUnavailableError, LogUnavailableError: no answer; call it again.
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
    """Refuse to rebuild single partitions after a change of the partition count.

    Raises:
        RecurError: the states are of another partition count.
    """
    for partition, value in (await store.watermarks(count)).items():
        mark = read_watermark(topic, partition, value)
        if mark.partitions != count and partitions is not None:
            raise RecurError(
                f"the states in Redis were written when {topic} had {mark.partitions} partitions,"
                f" and it has {count}: run `recur state repartition`, which moves them, or `recur"
                " state rebuild --all`, after which accounts that changed partition have no state"
            )


async def _count_states(
    settings: Settings, model: str, partitions: Sequence[int], sweep: bool
) -> dict[int, int]:
    """Count the states of each partition; delete them if ``sweep`` is set."""
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


def _new_log_lines(
    settings: Settings,
    resets: Sequence[PartitionRebuild],
    state_counts: dict[int, int],
    labels: Sequence[int],
    dry_run: bool,
    workers: bool,
) -> Iterator[str]:
    topic = settings.topic("transactions")
    for item in resets:
        states = f"{state_counts[item.partition]:,} states of the old log"
        verb = "would be deleted" if dry_run else "are deleted"
        records = f"{item.end - item.begin:,} records from offset {item.begin} on"
        yield f"{topic}-{item.partition}: {states} {verb}, {records}"
    for partition in labels:
        yield f"{settings.topic('labels')}-{partition}: labels are recorded from the log's begin"
    if not resets and not labels:
        yield f"{topic}: the states belong to the current log; nothing to do"
    elif dry_run:
        yield "dry run: nothing is done"
    elif workers:
        yield "the workers now compute the states from the new log"
    else:
        yield "no worker runs: the states are computed from the new log when one starts"


def _lines(
    topic: str,
    resets: Sequence[PartitionRebuild],
    state_counts: dict[int, int],
    dry_run: bool,
    workers: int,
    done: bool,
) -> Iterator[str]:
    for item in resets:
        records = f"{item.end - item.begin:,} records from offset {item.begin} on"
        states = f"{state_counts[item.partition]:,} states"
        yield f"{topic}-{item.partition}: {records}, {states}"
        if item.begin > 0 and not item.is_new_log:
            yield (
                "  retention has deleted earlier records: a rebuilt state covers only what the log"
                " still has; an account that is not in the log keeps its state"
            )
    if not resets:
        yield f"{topic}: no partition has states of this model; workers start at its begin anyway"
    elif dry_run:
        yield "would be computed again; nothing is done"
    elif done:
        yield "computed again; published scores are unchanged"
    elif workers:
        yield "the workers compute them again now; recur_consumer_lag_records shows what is left"
    else:
        yield "no worker runs: the states are computed again when one starts"
