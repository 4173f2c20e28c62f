"""What lies between Faust and aiokafka at a rebalance."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from pipeline.worker.faust_transport import (
    PREFETCH_BACKOFF_SECONDS,
    PREFETCH_BACKOFF_SEEKING_SECONDS,
    Consumer,
)

PAYMENTS, LABELS = TP("payments", 3), TP("labels", 3)


def test_the_fetcher_looks_soon_again_while_a_seek_may_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the backoff of a running flow a worker could wait for a partition's begin until the seek
    was given up, and never start to work.
    """
    fetcher = SimpleNamespace(_prefetch_backoff=None)
    seen: list[tuple[str, Any]] = []

    async def note(what: str) -> None:
        seen.append((what, fetcher._prefetch_backoff))

    async def seek_to_committed(consumer: Any) -> None:
        await note("seek to committed")

    async def assigned(consumer: Any, assigned: set[TP], generation_id: int) -> None:
        await note("assigned")
        await consumer.perform_seek()  # Faust does it in another task

    async def earliest_offsets(*places: TP) -> dict[TP, int]:
        await note(f"begin of {len(places)}")
        return dict.fromkeys(places, 5)

    monkeypatch.setattr(driver.Consumer, "perform_seek", seek_to_committed)
    monkeypatch.setattr(driver.Consumer, "on_partitions_assigned", assigned)
    consumer: Any = Consumer.__new__(Consumer)
    consumer._thread = SimpleNamespace(
        _ensure_consumer=lambda: SimpleNamespace(_fetcher=fetcher),
        earliest_offsets=earliest_offsets,
        seek=lambda place, offset: seen.append(
            (f"seek {place.topic} to {offset}", fetcher._prefetch_backoff)
        ),
    )
    consumer.app = SimpleNamespace(conf=SimpleNamespace(consumer_auto_offset_reset="latest"))
    consumer._reset = lambda: None
    consumer.on_assigned = lambda assigned: None
    consumer.assignment = lambda: {PAYMENTS, LABELS}
    consumer.from_begin = {"labels"}
    consumer._resets = 0
    consumer._begin, consumer._sought, consumer._committed_offset = {}, {}, {PAYMENTS: 7}

    for _ in range(2):  # at the first assignment, and at a later one
        asyncio.run(consumer.on_partitions_assigned({PAYMENTS, LABELS}))
        steps = ("assigned", "seek to committed", "begin of 1", "seek labels to 5")
        assert seen == [(step, PREFETCH_BACKOFF_SEEKING_SECONDS) for step in steps]
        assert fetcher._prefetch_backoff == PREFETCH_BACKOFF_SECONDS
        seen.clear()


def test_what_came_while_faust_sought_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next chunk would claim to begin where the group has committed, and what came before it
    would count as read: lost, if it was left out then.
    """
    position = {PAYMENTS: 0}

    def messages_of(consumer: Any, *offsets: int) -> tuple[int, int]:
        position[PAYMENTS] = offsets[-1] + 1
        records = [SimpleNamespace(offset=offset) for offset in offsets]
        (message,) = consumer._messages_of({PAYMENTS: records})
        chunk = message.value.chunks[PAYMENTS.partition]
        return chunk.begin, chunk.end

    async def seek_to_committed(consumer: Any) -> None:
        consumer._committed_offset[PAYMENTS] = position[PAYMENTS] = 7
        await asyncio.sleep(0)
        assert messages_of(consumer, 7, 8) == (7, 9)

    monkeypatch.setattr(driver.Consumer, "perform_seek", seek_to_committed)
    consumer: Any = Consumer.__new__(Consumer)
    consumer._thread = SimpleNamespace(
        _ensure_consumer=lambda: SimpleNamespace(_fetcher=SimpleNamespace()),
        seek=position.__setitem__,
    )
    consumer.app = SimpleNamespace(conf=SimpleNamespace(consumer_auto_offset_reset="earliest"))
    consumer.assignment = lambda: {PAYMENTS}
    consumer.from_begin, consumer.take_at_once, consumer._to_take = set(), set(), {}
    consumer._begin, consumer._sought, consumer._committed_offset = {}, {}, {}
    consumer._epochs = {PAYMENTS: 0}
    consumer._resets = resets = 4
    consumer._to_message = lambda place, record: SimpleNamespace(value=None)

    asyncio.run(consumer.perform_seek())

    assert position[PAYMENTS] == 7
    assert consumer._resets > resets, "a fetch under way would be taken"
    assert messages_of(consumer, 7, 8, 9) == (7, 10)


@pytest.mark.parametrize("ticks", range(4))
def test_who_is_told_to_stop_while_room_comes_stops(ticks: int) -> None:
    """A cancellation that was lost there left a worker waiting for ever, until it was killed."""

    async def run() -> None:
        consumer: Any = Consumer.__new__(Consumer)
        consumer._changed = asyncio.Event()
        consumer._in_flight = {number: ("payments", True) for number in range(3)}
        room = asyncio.create_task(consumer._room())
        await asyncio.sleep(0.01)
        consumer._in_flight.clear()
        consumer._changed.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        if room.cancel():
            with pytest.raises(asyncio.CancelledError):
                await room
        else:
            assert room.result()

    asyncio.run(run())
