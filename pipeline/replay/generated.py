"""Generated transactions as a feed of the transactions topic, and as the demo's stream."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from rich.console import Console

from model.generator.stream import HistoryStream
from model.simulator.world import OVER_220, SKIMMED_TERMINAL, STOLEN_CARD
from model.units import DAY_MS
from pipeline.files.column_mapping import OPTIONAL_FIELDS
from pipeline.files.generated import columns_of, field_values
from pipeline.kafka.topics import ensure_topics
from pipeline.replay.feeding import feed_with_bar
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, encode_block
from pipeline.replay.simulated import SimulatedColumns
from pipeline.settings import Settings

INTERRUPTED = 130

_SCENARIO_OF = np.array([0, STOLEN_CARD, SKIMMED_TERMINAL, OVER_220], np.int8)


def generated_blocks(stream: HistoryStream) -> Iterator[Block]:
    """Encode the transactions of a stream, some thousand at a time."""
    header, first = stream.generator.header, 0
    for window in stream.parts():
        for begin in range(0, len(window), BLOCK_TRANSACTIONS):
            part = window.at(slice(begin, begin + BLOCK_TRANSACTIONS))
            fields = field_values(header, part)
            none: list[str | None] = [None] * len(part)
            optional = [fields.pop(name, none) for name in OPTIONAL_FIELDS]
            yield encode_block(
                *columns_of(header, part, first),
                *[[None if v is None else str(v) for v in values] for values in optional],
                extra={name: list(values) for name, values in fields.items()},
            )
            first += len(part)


def generated_days(stream: HistoryStream) -> Iterator[SimulatedColumns]:
    """Yield the transactions of a stream day by day, as the demo takes them."""
    waiting: list[SimulatedColumns] = []
    day = None
    for window in stream.parts():
        days = window.time_ms // DAY_MS
        bounds = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(window)]
        for begin, end in pairwise(bounds):
            if day is not None and days[begin] != day:
                yield SimulatedColumns.joined(waiting)
                waiting = []
            day = days[begin]
            part = window.at(slice(begin, end))
            waiting.append(
                SimulatedColumns(
                    part.time_ms,
                    part.account,
                    part.merchant,
                    part.amount,
                    _SCENARIO_OF[part.fraud],
                )
            )
    yield SimulatedColumns.joined(waiting)


def send_generated(
    stream: HistoryStream, settings: Settings, rate: float | None, console: Console
) -> tuple[int, int]:
    """Send the transactions of a stream to the topic; return the exit code and their number.

    Raises:
        RecurError: the broker is unreachable or does not accept the records.
    """
    return asyncio.run(_send(stream, settings, rate, console))


async def _send(
    stream: HistoryStream, settings: Settings, rate: float | None, console: Console
) -> tuple[int, int]:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await ensure_topics(settings)
    feed = Feed(settings)
    expected = max(stream.expected, 1)
    await feed_with_bar(
        feed,
        generated_blocks(stream),
        console,
        "sending",
        lambda acked: min(acked / expected, 1.0),
        rate=rate,
        history=True,
        stop=stop,
    )
    return INTERRUPTED if stop.is_set() else 0, feed.count.acked
