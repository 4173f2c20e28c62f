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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from pipeline.account_choice import Choice, Everyone, One, Sample
from pipeline.account_state import RECENT_IDS, Watermark
from pipeline.errors import RecurError, StartupError
from pipeline.log_reader import LogReader
from pipeline.ownership import check_watermark, read_watermark
from pipeline.progress_bar import Bar
from pipeline.recompute import Advanced, PartitionLog
from pipeline.redis_calls import StoreForbiddenError, StoreUnavailableError
from pipeline.scorer import Scorer, ScorerBrokenError
from pipeline.settings import Settings
from pipeline.startup import answered_within
from pipeline.state_comparison import FINE, UNVERIFIABLE, Verdict, compare_states
from pipeline.state_store import Load, RedisStateStore
from pipeline.topics import partition_count

HIDDEN_TOLERANCE = 2e-3
"""Default of the largest difference of a hidden that is none; docs/verify.md has what was
measured."""

SCORE_TOLERANCE = 2e-3
"""Of a score likewise."""

LOAD_ACCOUNTS = 2_000
"""States that are loaded in one request."""

ATTEMPTS = 3
"""Times that a partition is verified whose watermark goes back meanwhile."""

DETAILS_MAX = 10_000
"""Accounts that are named of each kind; all are counted."""

_DAY_MS = 86_400_000
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

    def choice(self, partition: int, partitions: int) -> Choice:
        """The accounts of a partition."""
        if self.account is not None:
            return One(self.account)
        if self.sample is not None:
            return Sample(self.sample // partitions + (partition < self.sample % partitions))
        return Everyone()


@dataclass(frozen=True)
class Difference:
    """An account that is not what the log says.

    Attributes:
        what: is wrong.
        offset: the first one whose score differs, or where the state began anew; None where it is
            the state alone, so that the log cannot tell since when.
        hidden, score: largest differences; None where there is nothing to compare.
    """

    account_id: str
    partition: int
    what: str
    offset: int | None
    hidden: float | None
    score: float | None


@dataclass
class Verification:
    """What was found.

    Attributes:
        records, transactions: of the log, up to the watermarks read first.
        not_applied: records of the log past them.
        accounts: compared with Redis; ``right`` of them are what the log says.
        expired: that Redis let go as it should.
        largest_hidden, largest_score: differences, of all that could be compared.
        scores: compared.
        missing, duplicate, conflicting: scores by their source.
        first_missing, first_conflicting: partition and offset.
        unexpected: scores of records that must have none: rejected, or repeats.
        foreign_model: scores of other models, not compared.
        unverifiable_scores: of accounts whose history is not wholly known at that transaction.
        without_log: states of accounts without a transaction in the log; None: not looked for.
        lost_partitions: with published scores, and no watermark in Redis.
        unverifiable, differences: accounts with what is the matter, at most DETAILS_MAX of each.
        unverifiable_accounts, different_accounts: how many there are.
    """

    records: int = 0
    transactions: int = 0
    not_applied: int = 0
    accounts: int = 0
    right: int = 0
    expired: int = 0
    largest_hidden: float = 0.0
    largest_score: float = 0.0
    scores: int = 0
    missing: int = 0
    duplicate: int = 0
    conflicting: int = 0
    first_missing: tuple[int, int] | None = None
    first_conflicting: tuple[int, int] | None = None
    unexpected: int = 0
    foreign_model: int = 0
    unverifiable_scores: int = 0
    without_log: int | None = 0
    lost_partitions: list[int] = field(default_factory=list)
    unverifiable_accounts: int = 0
    different_accounts: int = 0
    unverifiable: list[tuple[str, int, str]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Nothing contradicts the log, as far as it can be verified."""
        return not (
            self.different_accounts
            or self.missing
            or self.conflicting
            or self.unexpected
            or self.without_log
            or self.lost_partitions
        )

    def differs(self, difference: Difference) -> None:
        """Note an account that is not what the log says."""
        self.different_accounts += 1
        if len(self.differences) < DETAILS_MAX:
            self.differences.append(difference)

    def cannot_verify(self, account_id: str, partition: int, why: str) -> None:
        """Note an account of which the log does not tell enough."""
        self.unverifiable_accounts += 1
        if len(self.unverifiable) < DETAILS_MAX:
            self.unverifiable.append((account_id, partition, why))

    def add(self, other: Verification) -> None:
        """Add what was found in another partition."""
        for name in (
            "records transactions not_applied accounts right expired scores missing duplicate"
            " conflicting unexpected foreign_model unverifiable_scores unverifiable_accounts"
            " different_accounts"
        ).split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_hidden = max(self.largest_hidden, other.largest_hidden)
        self.largest_score = max(self.largest_score, other.largest_score)
        self.first_missing = self.first_missing or other.first_missing
        self.first_conflicting = self.first_conflicting or other.first_conflicting
        self.lost_partitions += other.lost_partitions
        self.unverifiable += other.unverifiable[: DETAILS_MAX - len(self.unverifiable)]
        self.differences += other.differences[: DETAILS_MAX - len(self.differences)]


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
    choice: Choice


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
        return await _Verify(settings, checkpoint, options, bar, store, partitions).run()
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
                f"there is no topic {topic} at {settings.kafka_bootstrap}: correct "
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


class _Verify:
    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        options: VerifyOptions,
        bar: Bar,
        store: RedisStateStore,
        partitions: int,
    ) -> None:
        self._settings = settings
        self._options = options
        self._bar = bar
        self._store = store
        self._partitions = partitions
        self._model = checkpoint.digest
        self._scorer = Scorer(checkpoint, int(settings.state_ttl_days * _DAY_MS))
        self._topic = settings.topic("transactions")
        self._expiry_ms = int((settings.state_ttl_days + settings.log_retention_days) * _DAY_MS)
        self._total = self._done = 0

    async def run(self) -> Verification:
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
            async with LogReader(self._settings, self._topic, partition) as reader:
                bounds = await reader.bounds()
            check_watermark(self._topic, partition, mark, self._partitions, bounds.end)
            self._total += max(0, mark.next_offset - bounds.begin)
        return marks

    async def _watermark(self, partition: int) -> Watermark | None:
        (loaded,) = await self._ask(lambda: self._store.load([Load(partition, [])]))
        value = loaded.watermark
        return None if value is None else read_watermark(self._topic, partition, value)

    async def _lost(self, partition: int) -> list[int]:
        """The partition, if there are scores of it, so that it should have a watermark."""
        async with LogReader(self._settings, self._settings.topic("scores"), partition) as reader:
            bounds = await reader.bounds()
        return [partition] if bounds.end > bounds.begin else []

    # one partition -----------------------------------------------------------------------

    async def _verify(self, partition: int, mark: Watermark) -> tuple[Verification, _Partition]:
        choice = self._options.choice(partition, self._partitions)
        found = Verification()
        async with PartitionLog(self._settings, self._scorer, partition, choice) as log:
            until = mark.next_offset
            found.not_applied = max(0, log.end - max(until, log.begin))
            tally = ScoreTally(
                self._model, await self._range(log, until), self._options.tolerance_score
            )
            async for advanced in log.advance(until):
                tally.add(advanced)
                found.records += advanced.records
                found.transactions += int(advanced.applied.sum())
                self._show(advanced)
            choice.settle()
            chosen = [
                (account, row)
                for account, row in log.states.row_of.items()
                if choice.wants(account.encode())
            ]
            await self._compare(log, choice, chosen, until, tally, found)
            await log.scores.read_rest()
            tally.count(found, partition, chosen, log, choice)
            names = _hashes(account.encode() for account in log.states.row_of)
            return found, _Partition(names, log.begin, until, choice)

    async def _range(self, log: PartitionLog, until: int) -> range:
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
        log: PartitionLog,
        choice: Choice,
        chosen: Sequence[tuple[str, int]],
        until: int,
        tally: ScoreTally,
        found: Verification,
    ) -> None:
        """Load the states in Redis, and compare each with the log up to its own watermark."""
        loads = await self._load(log.partition, chosen, until)
        if loads and loads[-1][0] > log.end:
            await log.see_end()
        for next_offset, accounts, values in loads:
            async for _ in log.advance(next_offset):
                pass
            rows = np.array([row for _, row in accounts], np.intp)
            compared = compare_states(
                self._scorer.codec,
                [log.states.values[row] for row in rows.tolist()],
                values,
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
            states, _, _ = self._scorer.codec.decode(loaded.states)
            for account, value, first, last in zip(
                accounts,
                loaded.states,
                states.first_offset.tolist(),
                states.last_offset.tolist(),
                strict=True,
            ):
                if value is None or (known is not None and first >= known.next_offset):
                    continue  # gone meanwhile, or begun since
                if known is not None and 0 <= last < known.begin:
                    found.cannot_verify(account, partition, Verdict.EARLIER.value)
                    continue
                assert found.without_log is not None
                found.without_log += 1
                found.differs(
                    Difference(account, partition, Verdict.WITHOUT_LOG.value, None, None, None)
                )

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        return await answered_within(self._settings.startup_timeout_seconds, call)


class ScoreTally:
    """Scores of one partition, compared as they are computed.

    Args:
        model: digest of the one that computes; other models' scores are not compared.
        offsets: of the transactions whose scores are compared.
        tolerance: largest difference that is none.
    """

    def __init__(self, model: str, offsets: range, tolerance: float) -> None:
        self._model = model
        self._offsets = offsets
        self._tolerance = tolerance
        self._largest = np.zeros(0, np.float32)  # by row
        self._counts = np.zeros((0, 3), np.int64)  # by row: compared, foreign, unverifiable
        self._first_difference: dict[int, int] = {}
        self._missing: list[tuple[int, int]] = []  # row and offset
        self._unexpected: list[bytes] = []

    def add(self, advanced: Advanced) -> None:
        """Compare a micro-batch's scores."""
        row, offset = advanced.row, advanced.offset
        self._grow(int(row.max(initial=-1)) + 1)
        asked = advanced.applied & (offset >= self._offsets.start) & (offset < self._offsets.stop)
        there = np.array([score is not None for score in advanced.recorded], bool)
        is_ours = np.array(
            [s is not None and s.model == self._model for s in advanced.recorded], bool
        )
        published = np.array([0.0 if s is None else s.score for s in advanced.recorded], np.float32)
        compared = asked & is_ours & advanced.is_sure
        difference = np.where(compared, np.abs(advanced.score - published), np.float32(0))
        np.maximum.at(self._largest, row, difference)
        np.add.at(self._counts, (row[compared], 0), 1)
        np.add.at(self._counts, (row[asked & there & ~is_ours], 1), 1)
        # A transaction without a score may be a repeat of one that is in the log no longer.
        surely_missing = advanced.is_complete | (advanced.seen >= RECENT_IDS)
        missing = asked & ~there & surely_missing
        unsure = asked & ~compared & ~missing & ~(there & ~is_ours)
        np.add.at(self._counts, (row[unsure], 2), 1)
        for i in np.flatnonzero(missing).tolist():
            self._missing.append((int(row[i]), int(offset[i])))
        for i in np.flatnonzero(difference > self._tolerance).tolist():
            self._first_difference.setdefault(int(row[i]), int(offset[i]))
        self._unexpected += [key for source, key in advanced.unexpected if source in self._offsets]

    def _grow(self, rows: int) -> None:
        more = rows - len(self._largest)
        if more > 0:
            more = max(more, 1024, len(self._largest))
            self._largest = np.concatenate((self._largest, np.zeros(more, np.float32)))
            self._counts = np.concatenate((self._counts, np.zeros((more, 3), np.int64)))

    def first_difference(self, row: int) -> int | None:
        """The account's first offset whose score differs past the tolerance."""
        return self._first_difference.get(row)

    def largest(self, row: int) -> float | None:
        """The account's largest difference; None where no score was compared."""
        return float(self._largest[row]) if self._counts[row, 0] else None

    def count(
        self,
        found: Verification,
        partition: int,
        chosen: Sequence[tuple[str, int]],
        log: PartitionLog,
        choice: Choice,
    ) -> None:
        """Add up what was found of the chosen accounts."""
        rows = np.array([row for _, row in chosen], np.intp)
        if len(rows):
            compared, foreign, unsure = self._counts[rows].sum(axis=0).tolist()
            found.scores += compared
            found.foreign_model += foreign
            found.unverifiable_scores += unsure
            found.largest_score = max(found.largest_score, float(self._largest[rows].max()))
        are_chosen = set(rows.tolist())
        missing = [offset for row, offset in self._missing if row in are_chosen]
        found.missing = len(missing)
        found.first_missing = (partition, missing[0]) if missing else None
        found.unexpected = sum(choice.wants(key) for key in self._unexpected)
        conflicting = []
        for again in log.scores.again:
            if again.source in self._offsets and choice.wants(again.key):
                found.duplicate += not again.differs
                if again.differs:
                    conflicting.append(again.source)
        found.conflicting = len(conflicting)
        found.first_conflicting = (partition, min(conflicting)) if conflicting else None


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
