"""Faults of what comes in: records that are none, repeats, one account, false times, a flood."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import numpy as np

from tests.faults.fault import Fault
from tests.faults.harness import Rig
from tests.faults.invariants import topic_records
from tests.faults.workload import (
    NO_TRANSACTION,
    ChangeColumns,
    ChangeRecords,
    Sent,
    backwards,
    of_one_account,
    sent_twice,
)

RUN_SECONDS = 30.0
LARGE_RECORD_BYTES = 1_000_000
FLOOD_MAX_TRANSACTIONS = 2_000_000


class _Input(Fault):
    """A fault that lies in the load itself: it runs for a while."""

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        rests = range(10)
        for rest in rests:
            rig.fraction = rest / len(rests)
            await rig.go_on(rig.seconds(RUN_SECONDS, least=5) / len(rests))


class Undecodable(_Input):
    """Each one goes to the dead-letter topic, and the transactions around it have their scores."""

    name = "undecodable"
    what = "half of all records cannot be decoded, and one has 1 MB"

    def change_records(self) -> ChangeRecords:
        """See :class:`Fault`."""
        return _with_bad_ones()

    async def check(self, rig: Rig) -> list[str]:
        """See :class:`Fault`."""
        bad = int((rig.load.numbers_sent() == NO_TRANSACTION).sum())
        letters = await _count(topic_records(rig.settings, "dead_letter"))
        return [] if letters == bad else [f"{letters:,} dead letters of {bad:,} bad records"]


def _with_bad_ones() -> ChangeRecords:
    """After each record a bad one; the very first of them is large."""
    large = [b'{"transaction_id":"' + b"9" * LARGE_RECORD_BYTES + b'"}']

    def change(sent: Sent, rng: np.random.Generator) -> Sent:
        keys: list[bytes] = []
        values: list[bytes] = []
        kinds = rng.integers(0, len(_SPOILERS), len(sent.keys)).tolist()
        for key, value, kind in zip(sent.keys, sent.values, kinds, strict=True):
            keys += [key, key]
            values += [value, large.pop() if large else _SPOILERS[kind](value)]
        numbers = np.full(2 * len(sent.keys), NO_TRANSACTION, np.int64)
        numbers[::2] = sent.numbers
        return Sent(keys, values, numbers)

    return change


def _with(**fields: object) -> Callable[[bytes], bytes]:
    return lambda value: json.dumps(json.loads(value) | fields).encode()


_SPOILERS: tuple[Callable[[bytes], bytes], ...] = (
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
    """The second one is dropped by its id, and counted."""

    name = "sent-twice"
    what = "10 % of the transactions sent twice by the producer"

    def change_records(self) -> ChangeRecords:
        """See :class:`Fault`."""
        return sent_twice(0.1)

    async def check(self, rig: Rig) -> list[str]:
        """See :class:`Fault`."""
        numbers = rig.load.numbers_sent()
        repeats = len(numbers) - len(np.unique(numbers))
        dropped = await rig.crew.samples("recur_duplicate_transactions_total")
        return [] if dropped == repeats else [f"{dropped:,.0f} of {repeats:,} repeats counted"]


class HotAccount(_Input):
    """Its transactions take as many rounds, one after the other."""

    name = "hot-account"
    what = "an account with 30 % of all traffic"

    def change_columns(self) -> ChangeColumns:
        """See :class:`Fault`."""
        return of_one_account(0.3)


class Backwards(_Input):
    """Event time that runs backwards counts as no time passed."""

    name = "backwards"
    what = "timestamps that run backwards, by seconds and by years"

    def change_columns(self) -> ChangeColumns:
        """See :class:`Fault`."""
        return backwards


class Flood(Fault):
    """What cannot be scored at once waits in the log."""

    name = "flood"
    what = "the producer faster than the workers for a minute, then caught up"

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        await rig.load.stop()
        most = round(rig.seconds(FLOOD_MAX_TRANSACTIONS, least=50_000))
        await rig.load.start(rate=None, most=most)
        most_waited = 0
        looks = range(round(rig.seconds(60, least=5)))
        for look in looks:
            rig.fraction = look / len(looks)
            await rig.go_on(1.0)
            most_waited = max(most_waited, rig.watch.latest.lag or 0)
        await rig.load.stop()
        rig.notes.append(f"{most_waited:,} records waited at most")
        mark = await rig.mark()
        await rig.load.start(self.rate)
        await rig.recover(mark)
