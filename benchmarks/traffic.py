"""The payments that every contender scores: the simulator's, of 20,000 accounts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from model.simulator.handbook import Simulator, account_id, merchant_id
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, ahead, encode_block
from pipeline.settings import Settings

ACCOUNTS = 20_000
LIVE_BLOCK_TRANSACTIONS = 500
"""Size of a live block: a second at the lowest rate, so that timestamps are fresh when sent."""


HISTORY_DAYS_MAX = 30
"""Days before now at which the history of live transactions begins."""


def blocks(*, live: bool = False, history: int = 0) -> Iterator[Block]:
    """Simulate transactions without end and encode them.

    Args:
        live: whether they have the time of encoding, as in a payment system. Otherwise they
            have the simulator's time: at full speed, a second is a simulated day or more.
        history: number of transactions before the live ones, at the simulator's times.
    """
    size = LIVE_BLOCK_TRANSACTIONS if live else BLOCK_TRANSACTIONS
    begin = "2018-04-01"
    if history and live:
        begin = (datetime.now(UTC) - timedelta(days=HISTORY_DAYS_MAX)).date().isoformat()
    done = 0
    for day in Simulator(customers=ACCOUNTS, start_date=begin, seed=3).days():
        for at in range(0, len(day.amount), size):
            part = slice(at, at + size)
            times = day.timestamp_ms[part].tolist()
            if live and done >= history:
                times = [time.time_ns() // 1_000_000] * len(times)
            done += len(times)
            yield encode_block(
                [f"T{i}" for i in day.transaction_id[part].tolist()],
                [account_id(i) for i in day.account[part].tolist()],
                [merchant_id(i) for i in day.merchant[part].tolist()],
                day.amount[part].tolist(),
                ["EUR"] * len(times),
                times,
            )


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
