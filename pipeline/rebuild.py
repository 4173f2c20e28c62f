"""``recur state rebuild``: partitions' states are computed again from the log, by the workers.

A partition's watermark is set back to where its log begins, by the same guarded save that workers
use. From then on it is the case that they know: the watermark is not the expected one. Whoever
works on the partition writes nothing more of what it had computed, reads the log from its begin,
and keeps the scores that were published. The states that stand lie past the watermark, and so
count as absent until they are computed again; that they are deleted as well only makes room.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from pipeline.account_state import Watermark
from pipeline.codec import LOOK
from pipeline.errors import RecurError, SettingsError
from pipeline.instructions import send_instruction
from pipeline.key_scan import KeyScan
from pipeline.ownership import read_watermark
from pipeline.redis_calls import StoreUnavailableError
from pipeline.score_log import KafkaScoreLog, LogUnavailableError, ScoreLog
from pipeline.settings import Settings
from pipeline.startup import load_checkpoint
from pipeline.state_store import Load, RedisStateStore, Save, StateStore
from pipeline.topics import ensure_topics, group_members
from pipeline.watermark_wait import until_applied

WAIT_SECONDS = 86_400.0
"""A rebuild is waited for as long as a person does."""


@dataclass(frozen=True)
class TakenBack:
    """A partition whose states are to be computed again.

    Attributes:
        begin: the first offset that its log still has: states are computed from there.
        end: up to where they stood, or up to the log's end where that is before.
    """

    partition: int
    begin: int
    end: int


class Rebuild:
    """Sets watermarks back.

    Args:
        topic, scores_topic: full names.
        partitions: partition count of both.
        store, logs: where watermarks are, and where logs begin and end.
    """

    def __init__(
        self, topic: str, scores_topic: str, partitions: int, store: StateStore, logs: ScoreLog
    ) -> None:
        self._topic = topic
        self._scores_topic = scores_topic
        self._partitions = partitions
        self._store = store
        self._logs = logs

    async def look(self, partition: int) -> TakenBack | None:
        """What would be computed again; None for a partition without a watermark.

        Raises:
            StoreUnavailableError, LogUnavailableError: nothing can be said; ask again.
            StartupError: this version cannot read the watermark.
        """
        found = await self._plan(partition)
        return None if found is None else found[0]

    async def take_back(self, partition: int) -> TakenBack | None:
        """Set a partition's watermark back to the begin of its log.

        Without a watermark there is nothing to do: a worker begins at the log's begin by itself.

        Raises:
            StoreUnavailableError, LogUnavailableError: nothing can be said; ask again.
            StartupError: this version cannot read the watermark.
        """
        while (found := await self._plan(partition)) is not None:
            plan, standing, watermark = found
            save = Save(partition, standing, watermark.to_bytes(), [], [])
            if (await self._store.save([save]))[0]:
                return plan
            # A worker has saved in between: from where it is now.
        return None

    async def _plan(self, partition: int) -> tuple[TakenBack, bytes, Watermark] | None:
        bounds = await self._logs.bounds(self._topic, partition)
        scores = await self._logs.bounds(self._scores_topic, partition)
        (loaded,) = await self._store.load([Load(partition, [])])
        if loaded.watermark is None:
            return None
        standing = read_watermark(self._topic, partition, loaded.watermark)
        bounds_end = max(bounds.end, (await self._logs.bounds(self._topic, partition)).end)
        # A log that ends before the watermark is another one, and the scores are not of it.
        is_other_log = standing.next_offset > bounds_end
        first_score = scores.end if is_other_log else scores.begin
        end = max(bounds.begin, min(standing.next_offset, bounds_end))
        mark = Watermark(self._partitions, bounds.begin, first_score, secrets.randbits(64))
        return TakenBack(partition, bounds.begin, end), loaded.watermark, mark


async def rebuild_lines(
    settings: Settings,
    partitions: Sequence[int] | None,
    *,
    dry_run: bool,
    wait: bool,
    console: Console,
) -> list[str]:
    """What `recur state rebuild` prints, when it is done.

    Args:
        partitions: those to rebuild; None for all.

    Raises:
        RecurError: it cannot be done; the message says why.
    """
    model = load_checkpoint(settings).digest
    topic = settings.topic("transactions")
    count = (await ensure_topics(settings))["transactions"]
    wrong = [p for p in partitions or () if not 0 <= p < count]
    if wrong:
        raise SettingsError(f"{topic} has the partitions 0 to {count - 1}, and no {wrong[0]}")
    store = RedisStateStore.from_settings(settings, model)
    logs = KafkaScoreLog(settings)
    try:
        await logs.start()
        rebuild = Rebuild(topic, settings.topic("scores"), count, store, logs)
        await _check_counts(store, topic, count, partitions)
        wanted = list(range(count)) if partitions is None else list(partitions)
        act = rebuild.look if dry_run else rebuild.take_back
        taken = [item for p in wanted if (item := await act(p)) is not None]
        stood = await _states(settings, model, [item.partition for item in taken], not dry_run)
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
    return list(_describe(topic, taken, stood, dry_run, workers, done))


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
    async with KeyScan(settings) as scan:
        async for partition, accounts in scan.accounts(model, only):
            if partition in found:
                n = len(accounts)
                found[partition] += await scan.sweep(model, partition, accounts) if sweep else n
    return found


def _describe(
    topic: str,
    taken: Sequence[TakenBack],
    stood: dict[int, int],
    dry_run: bool,
    workers: int,
    done: bool,
) -> Iterator[str]:
    for item in taken:
        records = f"{item.end - item.begin:,} records from offset {item.begin} on"
        states = f"{stood[item.partition]:,} states"
        yield f"{topic}-{item.partition}: {records}, {states}"
        if item.begin > 0:
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
