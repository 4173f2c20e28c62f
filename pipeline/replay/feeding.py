"""Feed blocks to a topic behind a progress bar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from rich.console import Console

from pipeline.progress import Bar
from pipeline.replay.producer import Block, Feed, ahead

FRAME_SECONDS = 0.2


async def feed_with_bar(
    feed: Feed,
    blocks: Iterable[Block],
    console: Console,
    what: str,
    fraction: Callable[[int], float],
    *,
    rate: float | None = None,
    warm: bool = False,
    history: bool = False,
    stop: asyncio.Event | None = None,
) -> None:
    """Feed all blocks, show the progress, and wait for the acks.

    Args:
        what: text of the progress bar.
        fraction: share of the work that is done, 0 to 1, by the number of acked records.
        rate: see :meth:`pipeline.replay.producer.Feed.run`, as for the other arguments.
    """
    with Bar(console) as bar:
        async with feed:
            run = feed.run(ahead(blocks), rate=rate, warm=warm, history=history, stop=stop)
            feeding = asyncio.ensure_future(run)
            try:
                while not feeding.done():
                    await asyncio.wait([feeding], timeout=FRAME_SECONDS)
                    bar.show(what, feed.count.acked, fraction(feed.count.acked))
            finally:
                feeding.cancel()
            feeding.result()
