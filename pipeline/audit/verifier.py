"""`recur verify`: are the states in Redis and the published scores what the log says?

Each partition's log is read up to the watermark that was read first, and states and scores are
computed from it again. Then the states are loaded, some accounts at a time; each load tells the
watermark at which its states stand, and the computation goes on to just there before it compares.
So the comparison is exact at some watermark, whatever the workers do meanwhile. A watermark that
goes back (Redis lost data) has the partition verified anew.

Memory: the states of one partition, four bytes for each of its transactions, the last scores.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from pipeline.audit.account_filter import AccountFilter, AllAccounts, One, Sample
from pipeline.audit.recompute import Advanced, RecomputedPartition
from pipeline.audit.result import Difference, Verification
from pipeline.audit.score_comparison import ScoreTally
from pipeline.audit.state_comparison import FINE, UNVERIFIABLE, Verdict, compare_states
from pipeline.errors import RecurError, StartupError
from pipeline.kafka.partition_reader import OpenReader, kafka_readers
from pipeline.kafka.topics import partition_count, topic_ids
from pipeline.progress import Bar
from pipeline.scoring.scorer import ScorerBrokenError, scorer_of
from pipeline.scoring.watermark_check import check_watermark, read_watermark
from pipeline.settings import Settings
from pipeline.storage.client import StoreForbiddenError, StoreUnavailableError, retry_within
from pipeline.storage.state_store import Load, RedisStateStore, StateStore
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID
from pipeline.units import DAY_MS

HIDDEN_TOLERANCE = 2e-3
"""Default of the largest difference of a hidden that is none; docs/verify.md has what was
measured."""

SCORE_TOLERANCE = 2e-4
"""Of a score likewise."""

LOAD_ACCOUNTS = 2_000
"""States that are loaded in one request."""

ATTEMPTS = 3
"""Times that a partition is verified whose watermark goes back meanwhile."""

_SCORES_ALONE = "the state is right, scores are not"

T = TypeVar("T")


@dataclass(frozen=True)
class VerifyOptions:
    """What is verified.

    Attributes:
        account, sample: one account, or so many; None: all of them.
        from_ms, to_ms: scores of transactions whose records came in [from, to), CreateTime in
            epoch milliseconds; None: no bound.
        tolerance_hidden, tolerance_score: largest differences that are none.
    """

    account: str | None = None
    sample: int | None = None
    from_ms: int | None = None
    to_ms: int | None = None
    tolerance_hidden: float = HIDDEN_TOLERANCE
    tolerance_score: float = SCORE_TOLERANCE

    def choice(self, partition: int, partitions: int) -> AccountFilter:
        """The accounts of a partition."""
        if self.account is not None:
            return One(self.account)
        if self.sample is not None:
            return Sample(self.sample // partitions + (partition < self.sample % partitions))
        return AllAccounts()


class _WentBackError(Exception):
    """The watermark is behind the one that was read before."""


@dataclass(frozen=True)
class _Partition:
    """What is left to know of a partition once it is verified.

    Attributes:
        accounts: uint64, sorted: hashes of the accounts that the log has.
        begin, next_offset: of the log that was compared.
        choice: of accounts.
    """

    accounts: NDArray[np.uint64]
    begin: int
    next_offset: int
    choice: AccountFilter


async def verify(
    settings: Settings, checkpoint: Checkpoint, options: VerifyOptions, bar: Bar
) -> Verification:
    """Compare states and scores with the log.

    Raises:
        RecurError: something is away, or log and states do not belong together; the message
            says what to do.
    """
    partitions = await same_partition_counts(settings)
    store = RedisStateStore.from_settings(settings, checkpoint.digest)
    try:
        verifier = Verifier(
            settings, checkpoint, options, bar, store, partitions, kafka_readers(settings)
        )
        verifier.log_id = (await topic_ids(settings)).get(settings.topic("transactions"), NO_ID)
        return await verifier.run()
    except StoreUnavailableError as error:
        raise RecurError(
            f"Redis does not answer ({error}): start it, or set RECUR_REDIS_URL"
        ) from error
    except ScorerBrokenError as error:
        raise RecurError(f"the computation is broken on this machine: {error}") from error
    finally:
        await store.close()


async def same_partition_counts(settings: Settings) -> int:
    """Partitions of the transactions topic, and of the scores topic, which has as many.

    Raises:
        StartupError: a topic is not there, or has another number of them.
    """
    counts = {}
    for role in ("transactions", "scores"):
        topic = settings.topic(role)
        count = await partition_count(settings, topic)
        if count is None:
            raise StartupError(
                f"there is no topic {topic} at {settings.kafka_bootstrap_servers}: correct "
                f"RECUR_{role.upper()}_TOPIC or RECUR_TOPIC_PREFIX, or start a worker"
            )
        counts[topic] = count
    (transactions, count), (scores, scores_count) = counts.items()
    if count != scores_count:
        raise StartupError(
            f"topic {transactions} has {count} partitions and {scores} has {scores_count}: see that"
            " RECUR_TRANSACTIONS_TOPIC and RECUR_SCORES_TOPIC are the workers'"
        )
    return count


class VerifiedStore(StateStore, Protocol):
    """What verifying needs of a store."""

    async def watermarks(self, partitions: int) -> dict[int, bytes]:
        """Watermarks that there are, by partition."""

    def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Partition and account of every state that there is."""


class Verifier:
    """Verifies what lies in a store and a log.

    Args:
        settings, checkpoint: the workers'.
        bar: shows how far it is.
        store: account states.
        partitions: how many there are.
        open_reader: of the log.

    Attributes:
        log_id: the transactions topic's id; unknown unless it is set.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        options: VerifyOptions,
        bar: Bar,
        store: VerifiedStore,
        partitions: int,
        open_reader: OpenReader,
    ) -> None:
        self.log_id = NO_ID
        self._settings = settings
        self._options = options
        self._bar = bar
        self._store = store
        self._partitions = partitions
        self._open = open_reader
        self._model = checkpoint.digest
        self._scorer = scorer_of(settings, checkpoint)
        self._topic = settings.topic("transactions")
        self._expiry_ms = int((settings.state_ttl_days + settings.log_retention_days) * DAY_MS)
        self._total = self._done = 0

    async def run(self) -> Verification:
        """Verify all partitions.

        Raises:
            RecurError: see :func:`verify`.
            StoreUnavailableError: the store does not answer.
        """
        marks = await self._first_watermarks()
        found = Verification()
        verified: dict[int, _Partition] = {}
        for partition in range(self._partitions):
            mark = marks.get(partition)
            if mark is None:
                found.lost_partitions += await self._lost(partition)
                continue
            done = self._done
            for attempt in range(ATTEMPTS):
                try:
                    of_partition, verified[partition] = await self._verify(partition, mark)
                    break
                except _WentBackError:
                    if attempt == ATTEMPTS - 1:
                        raise RecurError(
                            f"the watermark of {self._topic}-{partition} went back {ATTEMPTS} times"
                            " meanwhile: Redis loses data, or fails over to an older copy"
                        ) from None
                    self._done = done
                    mark = await self._watermark(partition)
                    if mark is None:
                        found.lost_partitions += await self._lost(partition)
                        of_partition = Verification()
                        break
            found.add(of_partition)
        await self._look_without_log(found, verified)
        return found

    async def _first_watermarks(self) -> dict[int, Watermark]:
        values = await self._ask(lambda: self._store.watermarks(self._partitions))
        marks = {p: read_watermark(self._topic, p, value) for p, value in values.items()}
        for partition, mark in marks.items():
            async with self._open(self._topic, partition, 0) as reader:
                bounds = await reader.bounds()
            check_watermark(self._topic, partition, mark, self._partitions, bounds.end, self.log_id)
            self._total += max(0, mark.next_offset - bounds.begin)
        return marks

    async def _watermark(self, partition: int) -> Watermark | None:
        (loaded,) = await self._ask(lambda: self._store.load([Load(partition, [])]))
        value = loaded.watermark
        return None if value is None else read_watermark(self._topic, partition, value)

    async def _lost(self, partition: int) -> list[int]:
        """The partition, if there are scores of it, so that it should have a watermark."""
        async with self._open(self._settings.topic("scores"), partition, 0) as reader:
            bounds = await reader.bounds()
        return [partition] if bounds.end > bounds.begin else []

    # one partition -----------------------------------------------------------------------

    async def _verify(self, partition: int, mark: Watermark) -> tuple[Verification, _Partition]:
        choice = self._options.choice(partition, self._partitions)
        found = Verification()
        async with RecomputedPartition(
            self._settings, self._scorer, partition, choice, self._open, mark.scores_begin
        ) as log:
            until = mark.next_offset
            found.not_applied = max(0, log.end - max(until, log.begin))
            tally = ScoreTally(
                self._model, await self._range(log, until), self._options.tolerance_score
            )
            async for advanced in log.advance(until):
                tally.add(advanced)
                found.records += advanced.records
                self._show(advanced)
            choice.settle()
            tally.make_room(len(log.states.row_of))
            chosen = [
                (account, row)
                for account, row in log.states.row_of.items()
                if choice.wants(account.encode())
            ]
            await self._compare(log, choice, chosen, until, tally, found)
            await log.scores.read_rest()
            tally.count(found, partition, chosen, log.scores, choice)
            names = _hashes(account.encode() for account in log.states.row_of)
            return found, _Partition(names, log.begin, until, choice)

    async def _range(self, log: RecomputedPartition, until: int) -> range:
        """Offsets of the transactions whose scores are compared."""
        first, last = log.begin, until
        if self._options.from_ms is not None:
            at = await log.first_at(self._options.from_ms)
            first = max(first, until if at is None else at)
        if self._options.to_ms is not None:
            at = await log.first_at(self._options.to_ms)
            last = last if at is None else min(last, at)
        return range(first, max(first, last))

    def _show(self, advanced: Advanced) -> None:
        self._done += advanced.records
        self._bar.show("verifying", self._done, self._done / max(1, self._total, self._done))

    async def _compare(
        self,
        log: RecomputedPartition,
        choice: AccountFilter,
        chosen: Sequence[tuple[str, int]],
        until: int,
        tally: ScoreTally,
        found: Verification,
    ) -> None:
        """Load the states in Redis, and compare each with the log up to its own watermark."""
        loads = await self._load(log.partition, chosen, until)
        if loads and loads[-1][0] > until:
            await log.see_end()  # of what is applied since, the scores stand past the end then
        for next_offset, accounts, values in loads:
            async for _ in log.advance(next_offset):
                pass
            rows = np.array([row for _, row in accounts], np.intp)
            compared = compare_states(
                self._scorer.codec,
                [log.states.values[row] for row in rows.tolist()],
                values,
                next_offset=next_offset,
                log_begin=log.begin,
                lacks_features=log.states.lacks_features[rows],
                expired_before_ms=time.time_ns() // 1_000_000 - self._expiry_ms,
                tolerance=self._options.tolerance_hidden,
            )
            hidden = compared.hidden[~np.isnan(compared.hidden)]
            found.largest_hidden = max(found.largest_hidden, float(hidden.max(initial=0.0)))
            for (account, row), verdict, distance, began_at in zip(
                accounts,
                compared.verdicts,
                compared.hidden.tolist(),
                compared.began_at.tolist(),
                strict=True,
            ):
                self._note(found, log.partition, account, verdict, distance, began_at, tally, row)

    async def _load(
        self, partition: int, chosen: Sequence[tuple[str, int]], until: int
    ) -> list[tuple[int, Sequence[tuple[str, int]], list[bytes | None]]]:
        """States in Redis, with the watermark at which they stand; the least one first."""
        loads = []
        for start in range(0, len(chosen), LOAD_ACCOUNTS):
            accounts = chosen[start : start + LOAD_ACCOUNTS]
            request = Load(partition, [account for account, _ in accounts])
            (loaded,) = await self._ask(partial(self._store.load, [request]))
            if loaded.watermark is None:
                raise _WentBackError
            mark = read_watermark(self._topic, partition, loaded.watermark)
            if mark.next_offset < until:
                raise _WentBackError
            loads.append((mark.next_offset, accounts, loaded.states))
        return sorted(loads, key=lambda load: load[0])

    def _note(
        self,
        found: Verification,
        partition: int,
        account: str,
        verdict: Verdict,
        hidden: float,
        began_at: int,
        tally: ScoreTally,
        row: int,
    ) -> None:
        offset, distance = tally.first_difference(row), tally.largest(row)
        if verdict is Verdict.NONE:
            return
        if verdict is Verdict.MOVED:  # nor its scores: the log here lacks what is before them
            found.cannot_verify(account, partition, verdict.value)
            return
        if verdict in UNVERIFIABLE:
            found.cannot_verify(account, partition, verdict.value)
        elif verdict is Verdict.EXPIRED:
            found.expired += 1
        else:
            found.accounts += 1
            found.right += verdict is Verdict.RIGHT and offset is None
        if verdict in FINE | UNVERIFIABLE and offset is None:
            return
        what = _SCORES_ALONE if verdict in FINE | UNVERIFIABLE else verdict.value
        if verdict is Verdict.ANEW and offset is None:
            offset = began_at
        found.differs(
            Difference(
                account,
                partition,
                what,
                offset,
                None if np.isnan(hidden) else hidden,
                distance,
            )
        )

    # states without log ------------------------------------------------------------------

    async def _look_without_log(self, found: Verification, verified: dict[int, _Partition]) -> None:
        """States of accounts that have no transaction in the log, or lie in another partition."""
        if self._options.account is not None:
            places = [(p, self._options.account) for p in range(self._partitions)]
            await self._look_at(found, verified, places)
            return
        try:
            async for places in self._store.accounts():
                await self._look_at(found, verified, places)
        except StoreForbiddenError:
            found.without_log = None

    async def _look_at(
        self,
        found: Verification,
        verified: dict[int, _Partition],
        places: Iterable[tuple[int, str]],
    ) -> None:
        strangers: dict[int, list[str]] = {}
        for partition, account in places:
            known = verified.get(partition)
            if known is None or _is_stranger(known, account):
                strangers.setdefault(partition, []).append(account)
        for partition, accounts in strangers.items():
            request = Load(partition, accounts)
            (loaded,) = await self._ask(partial(self._store.load, [request]))
            known = verified.get(partition)
            states, sound, _ = self._scorer.codec.decode(loaded.states)
            for account, value, is_sound, first, last in zip(
                accounts,
                loaded.states,
                sound.tolist(),
                states.first_offset.tolist(),
                states.last_offset.tolist(),
                strict=True,
            ):
                if value is None or (known is not None and first >= known.next_offset):
                    continue  # gone meanwhile, or begun since
                if is_sound and _is_past(last, self._topic, partition, loaded.watermark):
                    continue  # it counts as absent
                if known is not None and is_sound and last < known.begin:
                    why = Verdict.EARLIER if last >= 0 else Verdict.MOVED
                    found.cannot_verify(account, partition, why.value)
                    continue
                assert found.without_log is not None
                found.without_log += 1
                found.differs(
                    Difference(account, partition, Verdict.WITHOUT_LOG.value, None, None, None)
                )

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        return await retry_within(self._settings.startup_timeout_seconds, call)


def _is_past(last: int, topic: str, partition: int, watermark: bytes | None) -> bool:
    """Whether a state lies past its partition's watermark, which was taken back."""
    return watermark is not None and last >= read_watermark(topic, partition, watermark).next_offset


def _is_stranger(known: _Partition, account: str) -> bool:
    """Whether the account is to be looked at, and the log has no transaction of it."""
    key = account.encode()
    if not known.choice.wants(key):
        return False
    number = np.uint64(xxhash.xxh3_64_intdigest(key))
    place = int(np.searchsorted(known.accounts, number))
    return place == len(known.accounts) or known.accounts[place] != number


def _hashes(keys: Iterator[bytes]) -> NDArray[np.uint64]:
    return np.sort(np.array([xxhash.xxh3_64_intdigest(key) for key in keys], np.uint64))
