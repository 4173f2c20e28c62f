"""The payments that every contender scores, of 20,000 accounts: simulated or generated ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from model.simulator.handbook import Simulator, account_id, merchant_id
from pipeline.files.generated import GeneratedColumns, columns_of
from pipeline.files.generated_stream import SHIPPED_GENERATOR, open_stream
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, ahead, encode_block
from pipeline.settings import Settings

ACCOUNTS = 20_000
LIVE_BLOCK_TRANSACTIONS = 500
"""Size of a live block: a second at the lowest rate, so that timestamps are fresh when sent."""


HISTORY_DAYS_MAX = 30
"""Days before now at which the history of live transactions begins."""

GENERATED_DAYS = 3_650
"""Days of generated payments: far more than a measurement takes."""

SEED = 3


def blocks(*, live: bool = False, history: int = 0, generated: bool = False) -> Iterator[Block]:
    """Make transactions without end and encode them.

    Args:
        live: whether they have the time of encoding, as in a payment system. Otherwise they
            have the source's time: at full speed, a second is a simulated day or more.
        history: number of transactions before the live ones, at the source's times.
        generated: whether the shipped generator makes them, not the simulator.
    """
    size = LIVE_BLOCK_TRANSACTIONS if live else BLOCK_TRANSACTIONS
    begin = "2018-04-01"
    if history and live:
        begin = (datetime.now(UTC) - timedelta(days=HISTORY_DAYS_MAX)).date().isoformat()
    done = 0
    for part in _generated(begin, size) if generated else _simulated(begin, size):
        if live and done >= history:
            part = part._replace(times_ms=[time.time_ns() // 1_000_000] * len(part.times_ms))
        done += len(part.times_ms)
        yield encode_block(*part)


def _simulated(begin: str, size: int) -> Iterator[GeneratedColumns]:
    for day in Simulator(customers=ACCOUNTS, start_date=begin, seed=SEED).days():
        for at in range(0, len(day.amount), size):
            part = slice(at, at + size)
            amounts = day.amount[part].tolist()
            yield GeneratedColumns(
                [f"T{i}" for i in day.transaction_id[part].tolist()],
                [account_id(i) for i in day.account[part].tolist()],
                [merchant_id(i) for i in day.merchant[part].tolist()],
                amounts,
                ["EUR"] * len(amounts),
                day.timestamp_ms[part].tolist(),
            )


def _generated(begin: str, size: int) -> Iterator[GeneratedColumns]:
    stream = open_stream(
        SHIPPED_GENERATOR,
        {},
        accounts=ACCOUNTS,
        days=GENERATED_DAYS,
        seed=SEED,
        start_date=begin,
    )
    header, first = stream.generator.header, 0
    for window in stream.parts():
        for at in range(0, len(window), size):
            part = window.at(slice(at, at + size))
            yield columns_of(header, part, first)
            first += len(part)


def first(stream: Iterator[Block], transactions: int) -> Iterator[Block]:
    """Take a number of transactions from the stream; drop the rest of the last block."""
    while transactions > 0:
        block = next(stream)
        yield Block(block.keys[:transactions], block.values[:transactions])
        transactions -= len(block.keys)


async def feed(
    settings: Settings, stream: Iterator[Block], transactions: int, rate: float | None
) -> float:
    """Publish the stream's next transactions without linger.

    Returns:
        the time by which the feed was late in all, seconds.
    """
    async with Feed(settings) as producer:
        await producer.run(ahead(first(stream, transactions)), rate=rate)
    return producer.count.behind_seconds
