"""Waiting until the workers have applied the log up to given offsets, with a progress bar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from rich.console import Console

from pipeline.progress import Bar
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_store import Load, StateStore
from pipeline.storage.watermark import Watermark

POLL_INTERVAL_SECONDS = 0.2
"""Time between two reads of the watermarks."""


async def wait_until_applied(
    store: StateStore, targets: Mapping[int, int], what: str, seconds: float, console: Console
) -> bool:
    """Wait until each partition's watermark has reached its target.

    The wait goes on while Redis does not answer.

    Args:
        targets: offsets by partition.
        what: name of the work in the progress bar.
        seconds: longest wait.

    Returns:
        whether all targets were reached in time.
    """
    deadline = time.monotonic() + seconds
    most = None
    with Bar(console) as bar:
        while True:
            left = await _records_left(store, targets)
            if left == 0:
                return True
            if time.monotonic() >= deadline:
                return False
            if left is not None:
                most = max(left, most or 0)
                bar.show(what, most - left, 1 - left / most)
            await asyncio.sleep(POLL_INTERVAL_SECONDS)


async def _records_left(store: StateStore, targets: Mapping[int, int]) -> int | None:
    """Count the records before the targets that are not applied; None without an answer."""
    try:
        replies = await store.load([Load(partition, []) for partition in targets])
    except StoreUnavailableError:
        return None
    left = 0
    for target, reply in zip(targets.values(), replies, strict=True):
        mark = reply.watermark
        reached = 0 if mark is None else Watermark.from_bytes(mark).next_offset
        left += max(0, target - reached)
    return left
