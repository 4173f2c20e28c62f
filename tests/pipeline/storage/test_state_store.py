"""One contract for every state store: the fake, a real Redis and a real Redis Cluster."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.cluster import RedisCluster as ClusterClient

from pipeline.local.redis import Redis, RedisCluster
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.keys import Keys
from pipeline.storage.state_store import Load, RedisStateStore, Save, StateStore
from tests.fakes.memory import MemoryStateStore

MODEL = "0f3a5b7c9d1e"
TTL_DAYS = 2.0
RETENTION_DAYS = 1.0
EXPIRY_MS = 3 * 86_400_000
ODD_IDS = ["a b", "", "é", "日本語", "{x}", "}{", "a:b", "a\nb", "\0", "%s", "x" * 256]
SERVERS = [pytest.param(name, marks=pytest.mark.live) for name in ("redis", "cluster")]


def settings_for(url: str, *, cluster: bool = False) -> Settings:
    """Make settings with a key prefix of the test."""
    return load_settings(
        redis_url=url,
        redis_cluster=cluster,
        redis_timeout_seconds=1.0,
        redis_key_prefix=f"test-{uuid.uuid4().hex[:12]}",
        state_ttl_days=TTL_DAYS,
        log_retention_days=RETENTION_DAYS,
    )


@dataclass
class Backend:
    """A server or fake for states; each opened store is another worker's connection.

    Attributes:
        open: a new store.
        client: what looks at the server past the store; None in memory.
        keys: of the states; None in memory.
        stop, start: take the server away and bring it back with its data.
    """

    open: Callable[[], StateStore]
    client: Callable[[], Any] | None = None
    keys: Keys | None = None
    stop: Callable[[], object] = field(default=lambda: None)
    start: Callable[[], object] = field(default=lambda: None)

    def run(self, test: Callable[..., Awaitable[None]], stores: int = 1) -> None:
        """Run a test with several stores, and close them afterwards."""

        async def go() -> None:
            async with AsyncExitStack() as stack:
                opened = [self.open() for _ in range(stores)]
                for store in opened:
                    stack.push_async_callback(store.close)
                await test(*opened)

        asyncio.run(go())


def memory_backend() -> Backend:
    shared = MemoryStateStore()

    def switch(is_up: bool) -> Callable[[], None]:
        return lambda: setattr(shared, "is_up", is_up)

    return Backend(lambda: shared, stop=switch(False), start=switch(True))


def redis_backend(server: Redis) -> Backend:
    settings = settings_for(server.url)
    return Backend(
        lambda: RedisStateStore.from_settings(settings, MODEL),
        server.client,
        Keys(settings.redis_key_prefix, MODEL, "transactions"),
        server.stop,
        server.start,
    )


def cluster_backend(cluster: RedisCluster) -> Backend:
    settings = settings_for(cluster.url, cluster=True)
    host, port = cluster.url.removeprefix("redis://").removesuffix("/0").split(":")
    return Backend(
        lambda: RedisStateStore.from_settings(settings, MODEL),
        lambda: ClusterClient(host=host, port=int(port)),
        Keys(settings.redis_key_prefix, MODEL, "transactions"),
        cluster.stop,
        cluster.start,
    )


@pytest.fixture(params=["memory", *SERVERS])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Provide each kind of store, on shared servers with keys of one test."""
    if request.param == "memory":
        return memory_backend()
    if request.param == "redis":
        return redis_backend(request.getfixturevalue("redis_server"))
    return cluster_backend(request.getfixturevalue("redis_cluster"))


@pytest.fixture(params=SERVERS)
def real_backend(request: pytest.FixtureRequest) -> Backend:
    """Provide the backends without the fake."""
    if request.param == "redis":
        return redis_backend(request.getfixturevalue("redis_server"))
    return cluster_backend(request.getfixturevalue("redis_cluster"))


@pytest.fixture(params=["memory", *SERVERS])
def stoppable(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Provide a server that the test may stop."""
    if request.param == "memory":
        yield memory_backend()
    elif request.param == "redis":
        with Redis() as server:
            yield redis_backend(server)
    else:
        with RedisCluster() as cluster:
            yield cluster_backend(cluster)


def save_of(
    partition: int,
    expected: bytes | None,
    watermark: bytes,
    states: dict[str, bytes] | None = None,
) -> Save:
    states = states or {}
    return Save(partition, expected, watermark, list(states), [*states.values()])


async def content(
    store: StateStore, partition: int, *accounts: str
) -> tuple[bytes | None, list[bytes | None]]:
    """Return the watermark and states."""
    (loaded,) = await store.load([Load(partition, list(accounts))])
    return loaded.watermark, list(loaded.states)


# load ------------------------------------------------------------------------------------


def test_saved_states_are_loaded_with_their_watermark(backend: Backend) -> None:
    async def go(store: StateStore) -> None:
        assert await content(store, 3, "A", "B") == (None, [None, None])

        assert await store.save([save_of(3, None, b"w1", {"A": b"a1", "B": b"\0\xff\r\n"})]) == [
            True
        ]

        assert await content(store, 3, "B", "C", "A") == (b"w1", [b"\0\xff\r\n", None, b"a1"])
        assert await content(store, 3) == (b"w1", [])

    backend.run(go)


def test_all_accounts_with_a_state_are_listed_and_no_others(real_backend: Backend) -> None:
    """The list covers all nodes and any names, but no other topic or model."""

    async def go(store: StateStore) -> None:
        assert isinstance(store, RedisStateStore)
        assert real_backend.keys is not None
        assert real_backend.client is not None
        names = [name for name in ODD_IDS if name]
        for partition in range(4):
            states = {f"{name}{partition}": b"s" for name in names}
            await store.save([save_of(partition, None, b"w", states)])
        key = real_backend.keys.accounts(3, ["A"])[0]
        with real_backend.client() as client:
            client.set(key.replace(b"transactions", b"transactions-1"), b"s")
            client.set(key.replace(MODEL.encode(), b"another"), b"s")
            client.set(key[:-1] + b"\xff", b"s")

        found = [place async for places in store.accounts() for place in places]

        assert sorted(found) == sorted((p, f"{name}{p}") for p in range(4) for name in names)

    real_backend.run(go)


def test_accounts_may_have_any_name_and_partitions_are_independent(backend: Backend) -> None:
    async def go(store: StateStore) -> None:
        for partition in range(3):
            states = {name: f"{partition}{name}".encode() for name in ODD_IDS}
            assert await store.save([save_of(partition, None, b"w", states)]) == [True]

        for partition in range(3):
            _, states_found = await content(store, partition, *ODD_IDS)
            assert states_found == [f"{partition}{name}".encode() for name in ODD_IDS]
        assert await content(store, 3, *ODD_IDS) == (None, [None] * len(ODD_IDS))

    backend.run(go)


def test_many_partitions_are_loaded_and_saved_in_one_call_in_order(
    backend: Backend,
) -> None:
    partitions = list(range(16))[::-1]
    saves = [
        save_of(p, None, b"w%d" % p, {f"A{i}": b"%d-%d" % (p, i) * 100 for i in range(100)})
        for p in partitions
    ]

    async def go(store: StateStore) -> None:
        assert await store.save(saves) == [True] * len(saves)

        loaded = await store.load([Load(p, ["A0", "none", "A99"]) for p in partitions])

        assert [found.watermark for found in loaded] == [b"w%d" % p for p in partitions]
        for p, found in zip(partitions, loaded, strict=True):
            assert list(found.states) == [b"%d-0" % p * 100, None, b"%d-99" % p * 100]

    backend.run(go)


def test_an_empty_request_gets_an_empty_answer(backend: Backend) -> None:
    async def go(store: StateStore) -> None:
        assert await store.load([]) == []
        assert await store.save([]) == []

    backend.run(go)


# conditional writes ----------------------------------------------------------------------


def test_a_state_of_none_is_deleted_in_the_same_save(backend: Backend) -> None:
    async def go(store: StateStore) -> None:
        await store.save([save_of(0, None, b"w1", {"A": b"a1", "B": b"b1", "C": b"c1"})])
        states = [None, b"b2", None]

        stale = await store.save([Save(0, b"w0", b"w2", ["A", "B", "D"], states)])
        assert stale == [False]
        assert await content(store, 0, "A", "B") == (b"w1", [b"a1", b"b1"])

        for _ in range(2):  # twice, as after a lost answer
            saved = await store.save([Save(0, b"w1", b"w2", ["A", "B", "D"], states)])
            assert saved == [True]
        found = await content(store, 0, "A", "B", "C", "D")
        assert found == (b"w2", [None, b"b2", b"c1", None])

        again = Save(0, b"w2", b"w3", ["B", "E", "B", "E"], [b"b3", None, None, b"e3"])
        assert await store.save([again]) == [True]
        assert await content(store, 0, "B", "E") == (b"w3", [None, b"e3"])

    backend.run(go)


@pytest.mark.parametrize("expected", [None, b"w0", b"w", b"w11"])
def test_a_save_that_expects_another_watermark_writes_nothing(
    backend: Backend, expected: bytes | None
) -> None:
    async def go(store: StateStore) -> None:
        await store.save([save_of(0, None, b"w1", {"A": b"a1"})])

        stands = await store.save([save_of(0, expected, b"w2", {"A": b"a2", "B": b"b2"})])

        assert stands == [False]
        assert await content(store, 0, "A", "B") == (b"w1", [b"a1", None])

    backend.run(go)


def test_a_save_that_expects_a_watermark_writes_nothing_without_one(backend: Backend) -> None:
    """The server lost its data, or failed over to an empty one."""

    async def go(store: StateStore) -> None:
        assert await store.save([save_of(0, b"w1", b"w2", {"A": b"a2"})]) == [False]
        assert await content(store, 0, "A") == (None, [None])

    backend.run(go)


def test_one_rejected_partition_does_not_stop_the_others(backend: Backend) -> None:
    async def go(store: StateStore) -> None:
        await store.save([save_of(p, None, b"w1", {"A": b"a1"}) for p in range(3)])

        stands = await store.save(
            [save_of(p, b"other" if p == 1 else b"w1", b"w2", {"A": b"a2"}) for p in range(3)]
        )

        assert stands == [True, False, True]
        for p in range(3):
            expected = (b"w1", [b"a1"]) if p == 1 else (b"w2", [b"a2"])
            assert await content(store, p, "A") == expected

    backend.run(go)


def test_a_repeated_save_whose_first_answer_was_lost_is_true(backend: Backend) -> None:
    request = save_of(0, b"w1", b"w2", {"A": b"a2"})

    async def go(store: StateStore) -> None:
        await store.save([save_of(0, None, b"w1")])

        assert await store.save([request]) == [True]
        assert await store.save([request]) == [True]
        assert await content(store, 0, "A") == (b"w2", [b"a2"])

        await store.save([save_of(0, b"w2", b"w3", {"A": b"a3"})])
        assert await store.save([request]) == [False]
        assert await content(store, 0, "A") == (b"w3", [b"a3"])

    backend.run(go)


def test_one_of_two_writers_wins_completely(backend: Backend) -> None:
    accounts = [f"A{i}" for i in range(50)]

    async def go(first: StateStore, second: StateStore) -> None:
        for turn in range(10):
            expected = (await content(first, 0))[0]
            (one,), (two,) = await asyncio.gather(
                *(
                    store.save([save_of(0, expected, mark, dict.fromkeys(accounts, mark))])
                    for store, mark in ((first, b"1-%d" % turn), (second, b"2-%d" % turn))
                )
            )
            assert one != two
            winner = b"%d-%d" % (1 if one else 2, turn)
            assert await content(first, 0, *accounts) == (winner, [winner] * len(accounts))

    backend.run(go, stores=2)


def test_concurrent_writers_lose_no_update(backend: Backend) -> None:
    """Each writer increments the loaded count; every successful save is one step."""

    async def count(store: StateStore, name: str) -> int:
        saved = 0
        for turn in range(20):
            watermark, (state,) = await content(store, 0, "A")
            mark = f"{name}{turn}".encode()
            one_more = b"%d" % (int(state or b"0") + 1)
            saved += (await store.save([save_of(0, watermark, mark, {"A": one_more})]))[0]
        return saved

    async def go(*stores: StateStore) -> None:
        saved = await asyncio.gather(*(count(s, f"writer{i}-") for i, s in enumerate(stores)))
        _, (state,) = await content(stores[0], 0, "A")
        assert int(state or b"0") == sum(saved) > 0

    backend.run(go, stores=3)


# real servers ----------------------------------------------------------------------------


def test_states_expire_after_ttl_and_retention_and_watermarks_do_not(real_backend: Backend) -> None:
    async def go(store: StateStore) -> None:
        await store.save([save_of(0, None, b"w1", {"A": b"a1", "B": b"b1"})])

    real_backend.run(go)
    assert real_backend.client is not None
    assert real_backend.keys is not None
    with real_backend.client() as client:
        assert client.pttl(real_backend.keys.watermark(0)) == -1
        for key in real_backend.keys.accounts(0, ["A", "B"]):
            assert EXPIRY_MS - 60_000 < client.pttl(key) <= EXPIRY_MS


def test_a_server_that_lost_its_scripts_gets_them_again(real_backend: Backend) -> None:
    assert real_backend.client is not None
    with real_backend.client() as client:

        async def go(store: StateStore) -> None:
            for turn in range(3):
                before = b"%d" % turn if turn else None
                after = b"%d" % (turn + 1)
                saves = [save_of(p, before, after, {"A": after}) for p in range(6)]
                assert await store.save(saves) == [True] * 6
                assert await content(store, 5, "A") == (after, [after])
                client.script_flush()

        real_backend.run(go)


def test_a_server_error_is_unavailability_without_accounts_or_values(
    real_backend: Backend,
) -> None:
    """redis-py would put the whole command into the message of a pipeline's error."""
    account, value = "4111-1111-1111-1111", b"secret state"
    keys = real_backend.keys
    assert real_backend.client is not None
    assert keys is not None
    with real_backend.client() as client:
        client.lpush(keys.watermark(1), "not a watermark")

        async def go(store: StateStore) -> None:
            saves = [save_of(p, None, b"w1", {account: value}) for p in range(3)]
            for requests in (saves, saves[1:2]):
                with pytest.raises(StoreUnavailableError) as caught:
                    await store.save(requests)
                assert account not in str(caught.value)
                assert value.decode() not in str(caught.value)
                assert keys.prefix not in str(caught.value)
            client.delete(keys.watermark(1))
            assert await store.save(saves) == [True] * 3

        real_backend.run(go)


@pytest.mark.live
def test_a_full_server_rejects_a_save_completely() -> None:
    with Redis() as server, server.client() as client:
        backend = redis_backend(server)

        async def go(store: StateStore) -> None:
            await store.save([save_of(0, None, b"w1", {"A": b"a1"})])
            client.config_set("maxmemory", 1)
            with pytest.raises(StoreUnavailableError, match=r"OOM|OutOfMemory"):
                await store.save([save_of(0, b"w1", b"w2", {"A": b"a2"})])
            assert await content(store, 0, "A") == (b"w1", [b"a1"])
            client.config_set("maxmemory", 0)
            assert await store.save([save_of(0, b"w1", b"w2", {"A": b"a2"})]) == [True]

        backend.run(go)


@pytest.mark.live
def test_an_unknown_command_is_not_quoted() -> None:
    """Redis puts the command's first arguments, and so account ids, into its message."""
    account = "4111-1111-1111-1111"
    with Redis(options={"rename-command": "MGET hidden"}) as server:

        async def go(store: StateStore) -> None:
            with pytest.raises(StoreUnavailableError, match="unknown command") as caught:
                await store.load([Load(0, [account])])
            assert account not in str(caught.value)

        redis_backend(server).run(go)


def test_one_node_of_a_cluster_that_may_evict_is_found(redis_cluster: RedisCluster) -> None:
    settings = settings_for(redis_cluster.url, cluster=True)

    async def go() -> list[str]:
        store = RedisStateStore.from_settings(settings, MODEL)
        try:
            return [server.name for server in await store.servers() if server.may_evict]
        finally:
            await store.close()

    for node in redis_cluster.nodes:
        with node.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            try:
                assert asyncio.run(go()) == [f"127.0.0.1:{node.port}"]
            finally:
                client.config_set("maxmemory-policy", "noeviction")
    assert asyncio.run(go()) == []


def test_the_eviction_policy_and_the_watermarks_are_available_at_the_start(
    real_backend: Backend,
) -> None:
    async def go(store: RedisStateStore) -> None:
        assert {server.policy for server in await store.servers()} == {"noeviction"}
        await store.save([save_of(1, None, b"w1"), save_of(4, None, b"w4")])
        assert await store.watermarks(8) == {1: b"w1", 4: b"w4"}

    real_backend.run(go)


def test_stores_of_another_model_share_nothing(redis_server: Redis) -> None:
    settings = settings_for(redis_server.url)

    async def go() -> None:
        stores = [RedisStateStore.from_settings(settings, model) for model in ("m1", "m2")]
        assert await stores[0].save([save_of(0, None, b"w1", {"A": b"a1"})]) == [True]
        assert await content(stores[1], 0, "A") == (None, [None])
        for store in stores:
            await store.close()

    asyncio.run(go())


# outages ---------------------------------------------------------------------------------


def test_a_stopped_server_is_unavailable_until_it_returns(stoppable: Backend) -> None:
    account, value = "4111-1111-1111-1111", b"secret state"
    save = save_of(0, b"w1", b"w2", {account: value})

    async def answers(store: StateStore) -> None:
        """Repeat a call as :class:`pipeline.scoring.retry.Retrier` does."""
        for _ in range(100):
            try:
                await store.ping()
                await store.load([Load(0, [account])])
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
            else:
                return
        raise AssertionError("it is back and the store does not notice")

    async def go(store: StateStore) -> None:
        assert await store.save([save_of(0, None, b"w1", {account: b"a1"})]) == [True]

        await asyncio.to_thread(stoppable.stop)
        for call in (
            lambda: store.load([Load(0, [account])]),
            lambda: store.load([Load(p, [account]) for p in range(4)]),
            lambda: store.save([save]),
            lambda: store.save([save, save_of(1, None, b"w1")]),
            store.ping,
        ):
            with pytest.raises(StoreUnavailableError) as caught:
                await call()
            assert account not in str(caught.value)
            assert value.decode() not in str(caught.value)

        await asyncio.to_thread(stoppable.start)
        await answers(store)
        assert await content(store, 0, account) == (b"w1", [b"a1"])
        assert await store.save([save, save_of(1, None, b"w1")]) == [True, True]
        assert await content(store, 0, account) == (b"w2", [value])

    stoppable.run(go)


def until_stopped(pid: int) -> None:
    """Return once the process is frozen."""
    for _ in range(1000):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, check=True
        )
        if state.stdout.startswith(b"T"):
            return
    raise AssertionError("it was paused and is not")


@pytest.mark.live
def test_a_hanging_server_is_unavailable_after_the_timeout_of_the_settings() -> None:
    with Redis() as server:
        backend = redis_backend(server)

        async def go(store: StateStore) -> None:
            await store.ping()
            server.pause()
            until_stopped(server.pid)
            try:
                with pytest.raises(StoreUnavailableError):
                    await asyncio.wait_for(store.load([Load(0, ["A"])]), 30)
            finally:
                server.resume()
            await store.ping()

        backend.run(go)
