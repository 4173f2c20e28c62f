"""Search for states by their keys: one contract for a real Redis and a real Redis Cluster."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from pipeline.local.redis import Redis, RedisCluster
from pipeline.settings import Settings, load_settings
from pipeline.storage.account_state import StateCodec
from pipeline.storage.state_scan import StateScan
from pipeline.storage.state_store import Load, RedisStateStore, Save
from pipeline.storage.watermark import Watermark

MODEL, OTHER = "0f3a5b7c9d1e", "aaaabbbbcccc"
ODD_IDS = ["a b", "é", "日本語", "{x}", "}{", "a:b", "a\nb", "\0", "%s", "x" * 256]
ODD_IDS += ["*", "?", "[a-c]", "\\", "\\*", "^", "a*b"]
SERVERS = [pytest.param(name, marks=pytest.mark.live) for name in ("redis", "cluster")]
CODEC = StateCodec(1, 4)


@pytest.fixture(params=SERVERS)
def settings(request: pytest.FixtureRequest) -> Settings:
    """Provide settings of a shared server, with a key prefix of each test."""
    is_cluster = request.param == "cluster"
    server: Redis | RedisCluster = request.getfixturevalue(
        "redis_cluster" if is_cluster else "redis_server"
    )
    return load_settings(
        redis_url=server.url,
        redis_cluster=is_cluster,
        redis_key_prefix=f"test-{uuid.uuid4().hex[:12]}",
    )


def state_at(offset: int) -> bytes:
    states, _, _ = CODEC.decode([None])
    states.history.count[:] = 1
    states.first_offset[:] = states.last_offset[:] = offset
    return CODEC.encode(states, np.arange(1))[0]


def mark(next_offset: int) -> bytes:
    return Watermark(4, next_offset, 0, 1).to_bytes()


@asynccontextmanager
async def opened(settings: Settings, model: str = MODEL) -> AsyncIterator[RedisStateStore]:
    store = RedisStateStore.from_settings(settings, model)
    try:
        yield store
    finally:
        await store.close()


async def save(settings: Settings, model: str, partition: int, states: dict[str, bytes]) -> None:
    async with opened(settings, model) as store:
        request = Save(partition, None, mark(5), list(states), list(states.values()))
        assert await store.save([request]) == [True]


async def found_in(
    scan: StateScan, model: str, partition: int | None = None
) -> set[tuple[int, str]]:
    return {
        (place, account)
        async for place, accounts in scan.accounts(model, partition)
        for account in accounts
    }


def run(settings: Settings, test: Callable[[StateScan], Awaitable[None]]) -> None:
    async def go() -> None:
        async with StateScan(settings) as scan:
            await test(scan)

    asyncio.run(go())


def test_all_states_of_a_model_are_found_and_no_others(settings: Settings) -> None:
    """Topics and models with a common prefix stay separate."""
    alike = settings.model_copy(update={"transactions_topic": "transactions-1"})

    async def go(scan: StateScan) -> None:
        names = [*ODD_IDS, *(f"A{i}" for i in range(1_500))]
        for partition in (1, 11):
            await save(settings, MODEL, partition, dict.fromkeys(names, b"s"))
        await save(settings, OTHER, 1, {"A": b"s"})
        await save(alike, MODEL, 1, {"A": b"s"})

        assert await found_in(scan, MODEL) == {(p, name) for p in (1, 11) for name in names}
        assert await found_in(scan, MODEL, 1) == {(1, name) for name in names}
        assert await found_in(scan, OTHER) == {(1, "A")}

    run(settings, go)


def test_all_states_of_an_account_are_found_for_any_name(settings: Settings) -> None:
    """The search covers all models and partitions. A name with wildcards matches itself only."""

    async def go(scan: StateScan) -> None:
        await save(settings, MODEL, 2, dict.fromkeys([*ODD_IDS, "b", "aXb"], b"four"))
        await save(settings, OTHER, 3, dict.fromkeys(ODD_IDS, b"s"))

        for name in ODD_IDS:
            copies = await scan.copies(name)
            assert [(c.model, c.partition, c.size_bytes) for c in copies] == [
                (MODEL, 2, 4),
                (OTHER, 3, 1),
            ]
            assert all(copy.expires_ms and copy.expires_ms > 86_400_000 for copy in copies)
        assert await scan.copies("nobody") == []

    run(settings, go)


def test_only_states_past_the_watermark_are_swept(settings: Settings) -> None:
    """States that no version can read count as absent, too."""
    states = {"before": state_at(4), "at": state_at(5), "past": state_at(2**40)}
    states |= {"moved": state_at(-1), "junk": b"junk", "other": b"\x63" + state_at(1)[1:]}

    async def go(scan: StateScan) -> None:
        await save(settings, MODEL, 2, states)

        assert await scan.sweep(MODEL, 2, [*states, "none"]) == 4

        assert await found_in(scan, MODEL) == {(2, "before"), (2, "moved")}

    run(settings, go)


def test_a_copied_state_expires_with_its_original(settings: Settings) -> None:
    async def go(scan: StateScan) -> None:
        await save(settings, MODEL, 2, {"A": b"old", "B": b"stays"})

        await scan.copy(MODEL, 2, 3, {"A": b"new"})
        await scan.copy(MODEL, 2, 3, {})
        (old, new) = await scan.copies("A")
        assert old.expires_ms is not None
        assert new.expires_ms is not None
        assert abs(old.expires_ms - new.expires_ms) < 10_000
        await scan.delete(MODEL, 2, ["A"])
        await scan.delete(MODEL, 2, [])

        async with opened(settings) as store:
            here, there = await store.load([Load(2, ["A", "B"]), Load(3, ["A"])])
        assert (here.states, there.states) == ([None, b"stays"], [b"new"])

    run(settings, go)
