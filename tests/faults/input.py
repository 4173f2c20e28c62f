"""Faults of the input: undecodable records, repeats, a hot account, wrong times, a flood."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import numpy as np

from tests.faults.fault import Fault
from tests.faults.harness import Harness
from tests.faults.invariants import topic_records
from tests.faults.workload import (
    NO_TRANSACTION,
    ChangeColumns,
    ChangeRecords,
    SentRecords,
    backwards,
    of_one_account,
    sent_twice,
)

RUN_SECONDS = 30.0
LARGE_RECORD_BYTES = 1_000_000
FLOOD_MAX_TRANSACTIONS = 2_000_000


class _Input(Fault):
    """A fault of the workload itself, which runs for a while."""

    async def disturb(self, harness: Harness) -> None:
        steps = range(10)
        for step in steps:
            harness.fraction = step / len(steps)
            await harness.run_for(harness.seconds(RUN_SECONDS, least=5) / len(steps))


class Undecodable(_Input):
    """Undecodable records, which go to the dead-letter topic without harm to their neighbours."""

    name = "undecodable"
    what = "half of all records cannot be decoded, and one has 1 MB"

    def change_records(self) -> ChangeRecords:
        return _with_bad_records()

    async def check(self, harness: Harness) -> list[str]:
        bad = int((harness.workload.numbers_sent() == NO_TRANSACTION).sum())
        dead_letters = await _count(topic_records(harness.settings, "dead_letter"))
        return (
            []
            if dead_letters == bad
            else [f"{dead_letters:,} dead letters for {bad:,} bad records"]
        )


def _with_bad_records() -> ChangeRecords:
    """Add a bad record after each record; the first bad one is large."""
    large = [b'{"transaction_id":"' + b"9" * LARGE_RECORD_BYTES + b'"}']

    def change(sent: SentRecords, rng: np.random.Generator) -> SentRecords:
        keys: list[bytes] = []
        values: list[bytes] = []
        kinds = rng.integers(0, len(_DAMAGES), len(sent.keys)).tolist()
        for key, value, kind in zip(sent.keys, sent.values, kinds, strict=True):
            keys += [key, key]
            values += [value, large.pop() if large else _DAMAGES[kind](value)]
        numbers = np.full(2 * len(sent.keys), NO_TRANSACTION, np.int64)
        numbers[::2] = sent.numbers
        return SentRecords(keys, values, numbers)

    return change


def _with(**fields: object) -> Callable[[bytes], bytes]:
    return lambda value: json.dumps(json.loads(value) | fields).encode()


_DAMAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda value: b"\x00\xff" + value,
    lambda value: value[: len(value) // 2],
    lambda value: b"",
    lambda value: b"[" + value + b"]",
    _with(amount=-1),
    _with(amount="12.50"),
    _with(currency="USD"),
    _with(merchant_id=""),
    _with(account_id="of another key"),
    _with(timestamp=4_102_444_800_000),  # the year 2100
    _with(timestamp=1_534_327_200),  # seconds
)


async def _count(pieces: AsyncIterator[list[object]]) -> int:
    return sum([len(records) async for records in pieces])


class SentTwice(_Input):
    """Repeats, which workers drop by their id and count."""

    name = "sent-twice"
    what = "10 % of the transactions sent twice by the producer"

    def change_records(self) -> ChangeRecords:
        return sent_twice(0.1)

    async def check(self, harness: Harness) -> list[str]:
        numbers = harness.workload.numbers_sent()
        repeats = len(numbers) - len(np.unique(numbers))
        dropped = await harness.pool.samples("recur_duplicate_transactions_total")
        return [] if dropped == repeats else [f"{dropped:,.0f} of {repeats:,} repeats counted"]


class HotAccount(_Input):
    """A hot account: each of its transactions takes a round of its own."""

    name = "hot-account"
    what = "an account with 30 % of all traffic"

    def change_columns(self) -> ChangeColumns:
        return of_one_account(0.3)


class Backwards(_Input):
    """Times that run backwards, which count as no time between."""

    name = "backwards"
    what = "timestamps that run backwards, by seconds and by years"

    def change_columns(self) -> ChangeColumns:
        return backwards


class Flood(Fault):
    """A flood of transactions, which wait in the log until they are scored."""

    name = "flood"
    what = "the producer faster than the workers for a minute, then normal again"

    async def disturb(self, harness: Harness) -> None:
        await harness.workload.stop()
        limit = round(harness.seconds(FLOOD_MAX_TRANSACTIONS, least=50_000))
        await harness.workload.start(rate=None, most=limit)
        waiting_max = 0
        steps = range(round(harness.seconds(60, least=5)))
        for step in steps:
            harness.fraction = step / len(steps)
            await harness.run_for(1.0)
            waiting_max = max(waiting_max, harness.monitor.latest.lag or 0)
        await harness.workload.stop()
        harness.notes.append(f"at most {waiting_max:,} records waited")
        mark = await harness.mark()
        await harness.workload.start(harness.rate)
        await harness.recover(mark)
