"""Manual command: correct merchant profiles (`recur state rebuild --merchants`).

Workers may run. The command counts the scores up to an offset, reads the profiles a little later,
and then counts the scores that came meanwhile. A stored count between the two is right. It
corrects other counts by their difference, so additions of workers are not lost. Transactions that
come during a read may be missed or doubled; the next round corrects them.

It also records known frauds again from the labels topic, in each slot up to the labels watermark.
Their merchant weights come from the labels, else from the scores. Counts whose scores retention
has deleted stay as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from model.features.merchant import BUCKET_MS, BUCKETS
from pipeline.admin.merchant_counts import (
    FirstScores,
    LoggedLabel,
    MerchantCounts,
    MerchantWeights,
    correction,
    frauds_of,
)
from pipeline.errors import RecurError, RejectedError
from pipeline.kafka.partition_reader import KafkaPartitionReader
from pipeline.kafka.polls import LogUnavailableError, Record
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import TopicRole, ensure_topics
from pipeline.messages.scores import decode_counted, source_prefix, stored_weight
from pipeline.progress import Bar
from pipeline.scoring.labels import label_of, merchant_label_of
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.keys import merchant_slot
from pipeline.storage.merchant_profile import (
    Fraud,
    Profile,
    decode_profiles,
    is_valid,
    transaction_hash,
)
from pipeline.storage.merchant_repair import MerchantRepair

READ_MAX = 8_192

MERCHANTS_PER_CALL = 2_000

SETTLE_SECONDS = 2.0
"""Time after which the transaction of a published score is counted: its save comes next."""

ROUNDS = 3
"""Most passes over the profiles whose counts had to be corrected."""

ATTEMPTS = 50
"""Most attempts at a slot in which workers record labels at the same time."""


@dataclass
class ProfileCorrections:
    """Outcome of a rebuild of profiles.

    Attributes:
        merchants: number of merchants in the log.
        counts: number of profiles whose counts differed from the log.
        missing, too_many: transactions that these profiles lacked, or counted twice.
        frauds: number of profiles whose known frauds differed from the log.
        from_bucket: first bucket of which the log holds all transactions; 0: it holds all.
        labels_deleted: whether retention has deleted labels.
    """

    merchants: int = 0
    counts: int = 0
    missing: int = 0
    too_many: int = 0
    frauds: int = 0
    from_bucket: int = 0
    labels_deleted: bool = False


class MerchantRebuild:
    """Corrects the profiles of all merchants in the log.

    Args:
        settings: the workers' settings.
        partitions, labels_partitions: partition counts of the scores and the labels topic.
        repair: reads and corrects profiles.
        bar: shows progress.
        dry_run: report differences, and change nothing.
    """

    def __init__(
        self,
        settings: Settings,
        partitions: int,
        labels_partitions: int,
        repair: MerchantRepair,
        bar: Bar,
        dry_run: bool,
    ) -> None:
        self._settings = settings
        self._repair = repair
        self._bar = bar
        self._dry_run = dry_run
        self._counts = MerchantCounts()
        topic = settings.topic("transactions")
        self._firsts = [
            FirstScores(source_prefix(topic, partition)) for partition in range(partitions)
        ]
        self._labels_end = [0] * labels_partitions
        self._labels: dict[int, dict[str, list[LoggedLabel]]] = {}  # by slot and merchant
        self._known_from = -1
        self._weights: dict[int, int] = {}
        self._found = ProfileCorrections()
        self._logs = KafkaScoreLog(settings)
        self._stack = AsyncExitStack()
        self._readers: dict[tuple[TopicRole, int], KafkaPartitionReader] = {}

    async def run(self) -> ProfileCorrections:
        """Compare all profiles with the log, and correct them.

        Raises:
            PartitionReaderError, LogUnavailableError: Kafka does not answer.
            StoreUnavailableError: Redis does not answer.
        """
        async with self._stack:
            await self._logs.start()
            self._stack.push_async_callback(self._logs.stop)
            return await self._run()

    async def _run(self) -> ProfileCorrections:
        await self._read_log()
        await self._correct_frauds()
        await self._read_scores(self._counts)
        merchants = list(self._counts.row_of)
        self._found.merchants = len(merchants)
        for number in range(1 if self._dry_run else ROUNDS):
            differing = await self._correct_counts(merchants)
            if number == 0:
                self._found.counts = len(differing)
            if not differing:
                break
            merchants = differing
        return self._found

    # the log -----------------------------------------------------------------------------

    async def _read_log(self) -> None:
        """Read labels first: the score of a labelled transaction precedes its label."""
        await self._read_labels()
        await self._read_scores(self._counts)

    async def _read_scores(self, into: MerchantCounts) -> None:
        """Count the scores up to the current end of the topic."""
        for partition, end in (await self._ends("scores", len(self._firsts))).items():
            await self._read_partition(partition, end, into)

    async def _read_partition(self, partition: int, end: int, into: MerchantCounts) -> None:
        firsts = self._firsts[partition]
        is_first = True
        async for records, begin in self._read("scores", partition, end):
            merchants, times = [], []
            for record in records:
                score = decode_counted(record.value)
                if score is None:
                    continue
                if is_first and begin > 0:
                    cut = score.timestamp // BUCKET_MS + 1
                    self._found.from_bucket = max(self._found.from_bucket, cut)
                is_first = False
                if firsts.source(score) is not None:
                    merchants.append(score.merchant_id)
                    times.append(score.timestamp)
                    if score.merchant_weight is not None:
                        of = transaction_hash(score.transaction_id)
                        self._weights[of] = stored_weight(score.merchant_weight)
            into.add(merchants, times)

    async def _read_labels(self) -> None:
        """Read the labels up to the current end of the topic."""
        limit_ms = int(self._settings.max_timestamp_ahead_seconds * 1000)
        for partition, end in (await self._ends("labels", len(self._labels_end))).items():
            is_first = True
            async for records, begin in self._read("labels", partition, end):
                for record in records:
                    try:
                        label, timestamp_ms, labelled_ms = label_of(record, limit_ms)
                    except RejectedError:
                        continue
                    booking = merchant_label_of(record.offset, label, timestamp_ms, labelled_ms)
                    slot = self._labels.setdefault(merchant_slot(booking.merchant_id), {})
                    logged = slot.setdefault(booking.merchant_id, [])
                    logged.append(LoggedLabel(partition, booking))
                    if is_first and begin > 0:
                        self._known_from = max(self._known_from, booking.entry.known)
                        self._found.labels_deleted = True
                    is_first = False
            self._labels_end[partition] = end

    async def _ends(self, role: TopicRole, partitions: int) -> dict[int, int]:
        # A reader's own connection may be waiting for records at this moment.
        return await self._logs.ends(self._settings.topic(role), list(range(partitions)))

    async def _read(
        self, role: TopicRole, partition: int, end: int
    ) -> AsyncIterator[tuple[list[Record], int]]:
        """Yield records up to an offset, and the partition's begin (0 after the first call)."""
        first_begin = 0
        reader = self._readers.get((role, partition))
        if reader is None:
            reader = KafkaPartitionReader(self._settings, self._settings.topic(role), partition)
            await self._stack.enter_async_context(reader)
            self._readers[role, partition] = reader
            first_begin = (await reader.bounds()).begin
            reader.skip_to(first_begin)
        start = reader.position
        while records := await reader.read(end, READ_MAX):
            yield records, first_begin
            done = reader.position - start
            self._bar.show(f"reading {role}", done, done / max(1, end - start))

    # known frauds ------------------------------------------------------------------------

    async def _correct_frauds(self) -> None:
        by_slot: dict[int, set[str]] = {slot: set(found) for slot, found in self._labels.items()}
        for merchant in self._counts.row_of:
            by_slot.setdefault(merchant_slot(merchant), set()).add(merchant)
        for number, (slot, merchants) in enumerate(by_slot.items()):
            for _ in range(ATTEMPTS):
                changed = await self._correct_slot(slot, sorted(merchants))
                if changed is not None:
                    self._found.frauds += changed
                    break
            else:
                raise RecurError(
                    f"workers recorded labels during each of {ATTEMPTS} corrections of a slot:"
                    " run the command again when fewer labels come"
                )
            self._bar.show("known frauds", number + 1, (number + 1) / len(by_slot))

    async def _correct_slot(self, slot: int, merchants: Sequence[str]) -> int | None:
        """Return the number of corrected profiles; None if a worker has recorded meanwhile."""
        recorded = await self._repair.recorded_to(slot)
        if any(to > read for to, read in zip(recorded, self._labels_end, strict=True)):
            await self._read_log()
        labels = self._labels.get(slot, {})
        values = await self._repair.profiles.load(merchants)
        weights = MerchantWeights(self._weights, self._found.from_bucket)
        frauds: dict[str, Sequence[Fraud]] = {}
        for merchant, value in zip(merchants, values, strict=True):
            stored = Profile.from_bytes(value).frauds if value and is_valid(value) else []
            logged = labels.get(merchant, [])
            touched = {label.booking.entry.id_hash for label in logged}
            retained = [
                f for f in stored if f.known <= self._known_from and f.id_hash not in touched
            ]
            due = frauds_of(logged, recorded, weights, stored, retained)
            if due != stored or (value is not None and not is_valid(value)):
                frauds[merchant] = due
        if self._dry_run or not frauds:
            return len(frauds)
        done = await self._repair.replace_frauds(slot, recorded, frauds)
        return len(frauds) if done else None

    # counts ------------------------------------------------------------------------------

    async def _profiles(self, merchants: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = []
        for start in range(0, len(merchants), MERCHANTS_PER_CALL):
            part = merchants[start : start + MERCHANTS_PER_CALL]
            values += await self._repair.profiles.load(part)
        return values

    async def _correct_counts(self, merchants: Sequence[str]) -> list[str]:
        """Correct the counts that differ; return the merchants of these profiles."""
        settling, reading = MerchantCounts(), MerchantCounts()
        await asyncio.sleep(SETTLE_SECONDS)
        await self._read_scores(settling)
        stored = await self._profiles(merchants)
        await self._read_scores(reading)
        differing: list[str] = []
        for start in range(0, len(merchants), MERCHANTS_PER_CALL):
            part = merchants[start : start + MERCHANTS_PER_CALL]
            profiles, _ = decode_profiles(stored[start : start + MERCHANTS_PER_CALL])
            newest = np.maximum(self._counts.newest(part), settling.newest(part))
            heads = np.maximum(profiles.head, newest)
            buckets = _buckets(heads)
            counts = profiles.counts.astype(np.int64)
            counts[(buckets > profiles.head[:, None]) | (profiles.head[:, None] < 0)] = 0
            least = self._counts.tables(part, heads)
            due = least + settling.tables(part, heads)
            delta = correction(counts, least, due, due + reading.tables(part, heads))
            delta[buckets < self._found.from_bucket] = 0
            differing += [part[row] for row in np.flatnonzero(delta.any(axis=1)).tolist()]
            await self._apply(part, buckets, delta)
            done = start + len(part)
            self._bar.show("counts", done, done / len(merchants))
        self._counts.merge(settling)
        self._counts.merge(reading)
        return differing

    async def _apply(
        self, merchants: Sequence[str], buckets: NDArray[np.int64], delta: NDArray[np.int64]
    ) -> None:
        more: dict[int, dict[str, int]] = {}
        fewer: dict[str, dict[int, int]] = {}
        rows, columns = np.nonzero(delta)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            number, bucket = int(delta[row, column]), int(buckets[row, column])
            if number > 0:
                more.setdefault(bucket, {})[merchants[row]] = number
                self._found.missing += number
            else:
                fewer.setdefault(merchants[row], {})[bucket] = -number
                self._found.too_many -= number
        if not self._dry_run:
            await self._repair.add(more)
            await self._repair.subtract(fewer)


def _buckets(heads: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64[n, BUCKETS]: the bucket at each position of profiles with these heads."""
    columns = np.arange(BUCKETS)
    found: NDArray[np.int64] = heads[:, None] - (heads[:, None] - columns) % BUCKETS
    return found


async def rebuild_merchants_lines(
    settings: Settings, *, dry_run: bool, console: Console
) -> list[str]:
    """Run `recur state rebuild --merchants`; return its output.

    Raises:
        RecurError: the profiles cannot be corrected; the message says why.
    """
    counts = await ensure_topics(settings)
    try:
        with Bar(console) as bar:
            async with MerchantRepair(settings, counts["labels"]) as repair:
                rebuild = MerchantRebuild(
                    settings, counts["scores"], counts["labels"], repair, bar, dry_run
                )
                found = await rebuild.run()
    except (StoreUnavailableError, LogUnavailableError) as error:
        raise RecurError(
            f"not all profiles are corrected ({error}): run the command again"
        ) from error
    return list(_lines(found, dry_run))


def _lines(found: ProfileCorrections, dry_run: bool) -> Iterator[str]:
    verb = "would be corrected" if dry_run else "corrected"
    yield f"{found.merchants:,} merchants in the log"
    yield (
        f"  counts of {found.counts:,} profiles {verb}: {found.missing:,} transactions were"
        f" missing, {found.too_many:,} too many"
    )
    yield f"  known frauds of {found.frauds:,} profiles {verb}"
    if found.from_bucket:
        day = np.datetime64(found.from_bucket * BUCKET_MS, "ms").astype("datetime64[m]")
        yield f"  scores before {day} UTC are deleted: earlier counts stay as they are"
    if found.labels_deleted:
        yield "  retention has deleted labels: frauds known from them stay as they are"
    if not dry_run and (found.counts or found.frauds):
        yield "  workers use the profiles from the next time bucket on, within three hours"
