"""Verification that states in Redis and published scores match the log (`recur verify`).

The verifier reads a watermark, reads the partition's log up to there, and recomputes states and
scores. Then it loads the states from Redis, some accounts at a time. Each load returns the
watermark of its states; the recomputation advances to this watermark before the comparison. So
each comparison is exact, whatever the workers do meanwhile. If a watermark goes back because
Redis lost data, the verifier starts the partition again.

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
from model.units import DAY_MS
from pipeline.audit.account_filter import AccountFilter, AllAccounts, SampledAccounts, SingleAccount
from pipeline.audit.recompute import RecomputedBatch, RecomputedPartition
from pipeline.audit.result import Difference, Verification
from pipeline.audit.score_comparison import ScoreComparison
from pipeline.audit.state_comparison import CONSISTENT, UNVERIFIABLE, StateStatus, compare_states
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

HIDDEN_TOLERANCE = 2e-3
"""Hidden states that differ by at most this count as equal; docs/verify.md has measurements."""

SCORE_TOLERANCE = 2e-4
"""Scores that differ by at most this count as equal."""

LOAD_ACCOUNTS = 2_000
"""Number of states in one request to Redis."""

ATTEMPTS = 3
"""Most attempts at a partition whose watermark goes back meanwhile."""

_SCORES_ALONE = "the state is right, scores are not"

T = TypeVar("T")


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification.

    Attributes:
        account: the only account to verify; None for no such restriction.
        sample: number of accounts to verify; None for all.
        from_ms, to_ms: range [from, to) of records' CreateTime whose scores are compared, epoch
            milliseconds; None for no bound.
        tolerance_hidden, tolerance_score: larger differences count.
    """

    account: str | None = None
    sample: int | None = None
    from_ms: int | None = None
    to_ms: int | None = None
    tolerance_hidden: float = HIDDEN_TOLERANCE
    tolerance_score: float = SCORE_TOLERANCE

    def account_filter(self, partition: int, partitions: int) -> AccountFilter:
        """Return the filter of a partition's accounts."""
        if self.account is not None:
            return SingleAccount(self.account)
        if self.sample is not None:
            return SampledAccounts(
                self.sample // partitions + (partition < self.sample % partitions)
            )
        return AllAccounts()


class _WatermarkWentBackError(Exception):
    """The watermark is behind the one that was read before: Redis lost data."""


@dataclass(frozen=True)
class _VerifiedPartition:
    """Summary of a verified partition.

    Attributes:
        accounts: uint64, sorted hashes of the accounts in the log.
        begin, next_offset: range of the log that was compared.
        account_filter: selects the verified accounts.
    """

    accounts: NDArray[np.uint64]
    begin: int
    next_offset: int
    account_filter: AccountFilter


async def verify(
    settings: Settings, checkpoint: Checkpoint, options: VerifyOptions, bar: Bar
) -> Verification:
    """Compare states and scores with the log.

    Raises:
        RecurError: a service does not answer, or log and states do not belong together; the
            message says what to do.
    """
    partitions = await shared_partition_count(settings)
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


async def shared_partition_count(settings: Settings) -> int:
    """Return the partition count that the transactions and the scores topic share.

    Raises:
        StartupError: a topic is missing, or the counts differ.
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


class VerifierStore(StateStore, Protocol):
    """Calls of a store that the verifier uses."""

    async def watermarks(self, partitions: int) -> dict[int, bytes]:
        """Return the existing watermarks, by partition."""

    def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield partition and account of every state."""


class Verifier:
    """Verifier of a store against a log.

    Args:
        settings, checkpoint: those of the workers.
        options: selects accounts and scores.
        bar: shows progress.
        store: holds account states.
        partitions: partition count.
        open_reader: opens a reader of the log.

    Attributes:
        log_id: id of the transactions topic; unknown unless it is set.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        options: VerifyOptions,
        bar: Bar,
        store: VerifierStore,
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
        verified: dict[int, _VerifiedPartition] = {}
        for partition in range(self._partitions):
            result = await self._verify_with_retries(partition, marks.get(partition))
            if result is None:
                found.lost_partitions += await self._lost_partition(partition)
                continue
            of_partition, verified[partition] = result
            found.add(of_partition)
        await self._find_states_without_log(found, verified)
        return found

    async def _verify_with_retries(
        self, partition: int, mark: Watermark | None
    ) -> tuple[Verification, _VerifiedPartition] | None:
        """Verify a partition, again if its watermark goes back; None without a watermark."""
        done = self._done
        for _ in range(ATTEMPTS):
            if mark is None:
                return None
            try:
                return await self._verify(partition, mark)
            except _WatermarkWentBackError:
                self._done = done
                mark = await self._watermark(partition)
        raise RecurError(
            f"the watermark of {self._topic}-{partition} went back {ATTEMPTS} times"
            " meanwhile: Redis loses data, or fails over to an older copy"
        )

    async def _first_watermarks(self) -> dict[int, Watermark]:
        values = await self._call(lambda: self._store.watermarks(self._partitions))
        marks = {p: read_watermark(self._topic, p, value) for p, value in values.items()}
        for partition, mark in marks.items():
            async with self._open(self._topic, partition, 0) as reader:
                bounds = await reader.bounds()
            check_watermark(self._topic, partition, mark, self._partitions, bounds.end, self.log_id)
            self._total += max(0, mark.next_offset - bounds.begin)
        return marks

    async def _watermark(self, partition: int) -> Watermark | None:
        (loaded,) = await self._call(lambda: self._store.load([Load(partition, [])]))
        value = loaded.watermark
        return None if value is None else read_watermark(self._topic, partition, value)

    async def _lost_partition(self, partition: int) -> list[int]:
        """Return the partition in a list if it has scores, and so should have a watermark."""
        async with self._open(self._settings.topic("scores"), partition, 0) as reader:
            bounds = await reader.bounds()
        return [partition] if bounds.end > bounds.begin else []

    # one partition -----------------------------------------------------------------------

    async def _verify(
        self, partition: int, mark: Watermark
    ) -> tuple[Verification, _VerifiedPartition]:
        account_filter = self._options.account_filter(partition, self._partitions)
        found = Verification()
        async with RecomputedPartition(
            self._settings, self._scorer, partition, account_filter, self._open, mark.scores_begin
        ) as log:
            until = mark.next_offset
            found.not_applied = max(0, log.end - max(until, log.begin))
            comparison = ScoreComparison(
                self._model, await self._range(log, until), self._options.tolerance_score
            )
            async for batch in log.advance(until):
                comparison.add(batch)
                found.records += batch.records
                self._show_progress(batch)
            account_filter.freeze()
            comparison.make_room(len(log.states.row_of))
            chosen = [
                (account, row)
                for account, row in log.states.row_of.items()
                if account_filter.selects(account.encode())
            ]
            await self._compare(log, account_filter, chosen, until, comparison, found)
            await log.scores.read_rest()
            comparison.count(found, partition, chosen, log.scores, account_filter)
            names = _hashes(account.encode() for account in log.states.row_of)
            return found, _VerifiedPartition(names, log.begin, until, account_filter)

    async def _range(self, log: RecomputedPartition, until: int) -> range:
        """Return the offsets of the transactions whose scores are compared."""
        first, last = log.begin, until
        if self._options.from_ms is not None:
            at = await log.first_at(self._options.from_ms)
            first = max(first, until if at is None else at)
        if self._options.to_ms is not None:
            at = await log.first_at(self._options.to_ms)
            last = last if at is None else min(last, at)
        return range(first, max(first, last))

    def _show_progress(self, batch: RecomputedBatch) -> None:
        self._done += batch.records
        self._bar.show("verifying", self._done, self._done / max(1, self._total, self._done))

    async def _compare(
        self,
        log: RecomputedPartition,
        account_filter: AccountFilter,
        chosen: Sequence[tuple[str, int]],
        until: int,
        comparison: ScoreComparison,
        found: Verification,
    ) -> None:
        """Load states from Redis, and compare each with the log up to its watermark."""
        loads = await self._load(log.partition, chosen, until)
        if loads and loads[-1][0] > until:
            await log.refresh_end()  # scores of transactions applied since lie past the old end
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
            for (account, row), status, distance, began_at in zip(
                accounts,
                compared.statuses,
                compared.hidden.tolist(),
                compared.began_at.tolist(),
                strict=True,
            ):
                self._record_status(
                    found, log.partition, account, status, distance, began_at, comparison, row
                )

    async def _load(
        self, partition: int, chosen: Sequence[tuple[str, int]], until: int
    ) -> list[tuple[int, Sequence[tuple[str, int]], list[bytes | None]]]:
        """Load states in groups with their watermarks; the smallest watermark comes first."""
        loads = []
        for start in range(0, len(chosen), LOAD_ACCOUNTS):
            accounts = chosen[start : start + LOAD_ACCOUNTS]
            request = Load(partition, [account for account, _ in accounts])
            (loaded,) = await self._call(partial(self._store.load, [request]))
            if loaded.watermark is None:
                raise _WatermarkWentBackError
            mark = read_watermark(self._topic, partition, loaded.watermark)
            if mark.next_offset < until:
                raise _WatermarkWentBackError
            loads.append((mark.next_offset, accounts, loaded.states))
        return sorted(loads, key=lambda load: load[0])

    def _record_status(
        self,
        found: Verification,
        partition: int,
        account: str,
        status: StateStatus,
        hidden: float,
        began_at: int,
        comparison: ScoreComparison,
        row: int,
    ) -> None:
        offset, distance = comparison.first_difference(row), comparison.largest(row)
        if status is StateStatus.NONE:
            return
        if status in UNVERIFIABLE:
            found.add_unverifiable(account, partition, status.value)
            if status is StateStatus.MOVED:
                return  # the log lacks earlier transactions, so its scores are not comparable
        elif status is StateStatus.EXPIRED:
            found.expired += 1
        else:
            found.accounts += 1
            found.right += status is StateStatus.RIGHT and offset is None
        if status in CONSISTENT | UNVERIFIABLE and offset is None:
            return
        what = _SCORES_ALONE if status in CONSISTENT | UNVERIFIABLE else status.value
        if status is StateStatus.OTHER_BEGIN and offset is None:
            offset = began_at
        hidden_distance = None if np.isnan(hidden) else hidden
        found.add_difference(
            Difference(account, partition, what, offset, hidden_distance, distance)
        )

    # states without log ------------------------------------------------------------------

    async def _find_states_without_log(
        self, found: Verification, verified: dict[int, _VerifiedPartition]
    ) -> None:
        """Find states without a transaction in the log of their partition."""
        if self._options.account is not None:
            locations = [(p, self._options.account) for p in range(self._partitions)]
            await self._check_unknown(found, verified, locations)
            return
        try:
            async for locations in self._store.accounts():
                await self._check_unknown(found, verified, locations)
        except StoreForbiddenError:
            found.without_log = None

    async def _check_unknown(
        self,
        found: Verification,
        verified: dict[int, _VerifiedPartition],
        locations: Iterable[tuple[int, str]],
    ) -> None:
        unknown: dict[int, list[str]] = {}
        for partition, account in locations:
            known = verified.get(partition)
            if known is None or _is_unknown(known, account):
                unknown.setdefault(partition, []).append(account)
        for partition, accounts in unknown.items():
            request = Load(partition, accounts)
            (loaded,) = await self._call(partial(self._store.load, [request]))
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
                    continue  # deleted meanwhile, or created since
                if is_sound and _is_past(last, self._topic, partition, loaded.watermark):
                    continue  # such a state counts as absent
                if known is not None and is_sound and last < known.begin:
                    why = StateStatus.EARLIER if last >= 0 else StateStatus.MOVED
                    found.add_unverifiable(account, partition, why.value)
                    continue
                assert found.without_log is not None
                found.without_log += 1
                found.add_difference(
                    Difference(account, partition, StateStatus.WITHOUT_LOG.value, None, None, None)
                )

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        return await retry_within(self._settings.startup_timeout_seconds, call)


def _is_past(last: int, topic: str, partition: int, watermark: bytes | None) -> bool:
    """Check whether a state lies past its partition's watermark, which was reset."""
    return watermark is not None and last >= read_watermark(topic, partition, watermark).next_offset


def _is_unknown(known: _VerifiedPartition, account: str) -> bool:
    """Check whether a selected account has no transaction in the log."""
    key = account.encode()
    if not known.account_filter.selects(key):
        return False
    number = np.uint64(xxhash.xxh3_64_intdigest(key))
    index = int(np.searchsorted(known.accounts, number))
    return index == len(known.accounts) or known.accounts[index] != number


def _hashes(keys: Iterator[bytes]) -> NDArray[np.uint64]:
    return np.sort(np.array([xxhash.xxh3_64_intdigest(key) for key in keys], np.uint64))
