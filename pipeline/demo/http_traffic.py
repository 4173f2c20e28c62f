"""HTTP traffic of the demo: a part of the live payments goes through the gateway."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
from numpy.typing import NDArray

from pipeline.gateway.api_keys import api_key_store, new_key
from pipeline.replay.producer import Block, Feed
from pipeline.settings import Settings

REQUESTS_PER_SECOND = 20.0
"""Aim for the requests of the live phase; they are at most half of its payments."""

LANES = 8
"""Most requests at once. An account's payments keep to one lane, and so their order."""

REQUEST_SECONDS = 10.0
WAIT_SECONDS = 10
"""Wait for a score that the printed command asks for: in the burst it comes late."""

LATENCY_WINDOW_SECONDS = 10.0
LATENCIES_MAX = 100_000
"""Latest latencies that the summary's quantiles come from."""

VISITOR_PREFIX = "curl-"
"""Begin of the transaction ids of the printed command."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HttpFigures:
    """Figures of the requests; None: there are none yet."""

    requests: int = 0
    errors: int = 0
    p50_seconds: float | None = None
    p99_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class LivePart:
    """Payments of a phase, divided between the feed and the requests."""

    fed: Block
    posted: Block
    lanes: NDArray[np.int64]
    """Lane of each posted payment, int64[n]."""


def divide(blocks: Sequence[Block], accounts: NDArray[np.int64], rate: float) -> LivePart:
    """Choose the accounts whose payments go through the gateway.

    Args:
        blocks: encoded payments.
        accounts: account number of each payment, int64[n].
        rate: payments/s of the phase.
    """
    keys = [key for block in blocks for key in block.keys]
    values = [value for block in blocks for value in block.values]
    due_seconds = np.arange(len(keys)) / rate
    one_in = max(2, math.ceil(rate / REQUESTS_PER_SECOND))
    is_posted = accounts % one_in == 0

    def chosen(mask: NDArray[np.bool_]) -> Block:
        at = np.flatnonzero(mask)
        places = at.tolist()
        return Block([keys[i] for i in places], [values[i] for i in places], due_seconds[at])

    return LivePart(chosen(~is_posted), chosen(is_posted), accounts[is_posted] // one_in % LANES)


class HttpTraffic:
    """Client of the demo's gateway, as an asynchronous context manager.

    Args:
        address: the gateway's, such as http://127.0.0.1:8080.
        token: API key.
        feed: takes a payment whose request failed. Workers drop it if the gateway sent it, too.

    Attributes:
        accepted: number of payments that the gateway has put into the log.
    """

    def __init__(self, address: str, token: str, feed: Feed) -> None:
        self.accepted = 0
        self._requests = self._errors = 0
        self._url = f"{address}/v1/scores"
        self._token = token
        self._feed = feed
        self._latencies: deque[tuple[float, float]] = deque(maxlen=LATENCIES_MAX)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpTraffic:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=LANES),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def run(self, part: LivePart) -> None:
        """Post the payments at their due times."""
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for lane in range(LANES):
                places = np.flatnonzero(part.lanes == lane).tolist()
                group.create_task(self._run_lane(part.posted, places, start))

    def figures(self, *, recent: bool = False) -> HttpFigures:
        """Add up all requests; ``recent``: quantiles of the last seconds only."""
        since = time.monotonic() - LATENCY_WINDOW_SECONDS if recent else float("-inf")
        seconds = []
        for at, latency in reversed(self._latencies):
            if at < since:
                break
            seconds.append(latency)
        if not seconds:
            return HttpFigures(self._requests, self._errors)
        p50, p99 = np.quantile(seconds, (0.5, 0.99)).tolist()
        return HttpFigures(self._requests, self._errors, p50, p99)

    def command(self, transaction: dict[str, object]) -> str:
        """Make a shell command that scores a transaction, with a new id at each run."""
        body = json.dumps({"transaction_id": VISITOR_PREFIX} | transaction)
        body = body.replace(VISITOR_PREFIX, f"{VISITOR_PREFIX}'$(date +%s%N)'")
        return (
            f"curl -s {self._url} -H 'Authorization: Bearer {self._token}'"
            f" -H 'Content-Type: application/json' -H 'Prefer: wait={WAIT_SECONDS}' -d '{body}'"
        )

    async def _run_lane(self, block: Block, places: Sequence[int], start: float) -> None:
        assert block.due_seconds is not None
        for place in places:
            await asyncio.sleep(max(0.0, start + block.due_seconds[place] - time.monotonic()))
            if await self._post(block.values[place]):
                self.accepted += 1
            else:
                await self._feed.send([block.keys[place]], [block.values[place]], history=True)

    async def _post(self, body: bytes) -> bool:
        """Post a payment; return whether the gateway has put it into the log."""
        assert self._session is not None
        self._requests += 1
        started = time.monotonic()
        try:
            async with self._session.post(self._url, data=body) as response:
                await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("a request to the gateway failed: %s", type(error).__name__)
            self._errors += 1
            return False
        if status not in (200, 202):
            log.warning("the gateway answered with status %d", status)
            self._errors += 1
            return False
        now = time.monotonic()
        self._latencies.append((now, now - started))
        return True


async def add_demo_key(settings: Settings) -> str:
    """Add an API key without a rate limit, as `recur keys add` does, and return its token."""
    key, token = new_key("demo", ("score", "read"), rate="none")
    async with api_key_store(settings) as store:
        await store.add(key)
    return token
