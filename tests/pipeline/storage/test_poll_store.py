"""Polls in a real Redis and a real Redis Cluster: one load, one save, notes before states."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.cluster import RedisCluster as ClusterClient

from pipeline.local.redis import Redis, RedisCluster
from pipeline.messages.replies import StoredAnswer
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.keys import Keys, MerchantKeys, merchant_slot
from pipeline.storage.merchant_profile import Profile
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.poll_store import RedisPollStore
from pipeline.storage.state_store import Load, RedisStateStore, Save
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS, ScoredNote, TransactionNote

pytestmark = pytest.mark.live

MODEL = "0f3a5b7c9d1e"
MERCHANTS = [f"M{i}" for i in range(40)]
NOTES = [ScoredNote(merchant, i, "review", 100 + i) for i, merchant in enumerate(MERCHANTS)]


@dataclass
class Opened:
    """A poll store, the two stores below it, and a client that looks past them."""

    polls: RedisPollStore
    states: RedisStateStore
    merchants: RedisMerchantStore
    client: Any
    keys: Keys
    merchant_keys: MerchantKeys

    def note_key(self, note: ScoredNote) -> bytes:
        return self.merchant_keys.note(merchant_slot(note.merchant_id), note.transaction_hash)

    def notes(self) -> int:
        return sum(self.client.get(self.note_key(note)) is not None for note in NOTES)

    async def counted(self) -> int:
        values = await self.merchants.load(MERCHANTS)
        return sum(int(Profile.from_bytes(v).counts.sum()) for v in values if v is not None)


@dataclass
class Checks:
    """A loss check that records its calls."""

    absent: list[bool] = field(default_factory=list)

    async def require_no_loss(self, *, absent: bool) -> None:
        self.absent.append(absent)


@dataclass
class Server:
    """A Redis or a Redis Cluster, with a key prefix of the test."""

    settings: Settings
    client: Callable[[], Any]

    @property
    def is_cluster(self) -> bool:
        return self.settings.redis_cluster

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Opened]:
        settings = self.settings
        states = RedisStateStore.from_settings(settings, MODEL)
        merchants = RedisMerchantStore.from_settings(settings)
        keys = Keys(settings.redis_key_prefix, MODEL, "transactions")
        merchant_keys = MerchantKeys(settings.redis_key_prefix)
        with self.client() as client:
            try:
                polls = RedisPollStore(states, merchants)
                yield Opened(polls, states, merchants, client, keys, merchant_keys)
            finally:
                await states.close()
                await merchants.close()

    def run(self, test: Callable[[Opened], Awaitable[None]]) -> None:
        async def go() -> None:
            async with self.opened() as stores:
                await test(stores)

        asyncio.run(go())


def server_of(server: Redis | RedisCluster) -> Server:
    settings = load_settings(
        redis_url=server.url,
        redis_cluster=isinstance(server, RedisCluster),
        redis_key_prefix=f"test-{uuid.uuid4().hex[:12]}",
    )
    if isinstance(server, Redis):
        return Server(settings, server.client)
    node = server.nodes[0]
    return Server(settings, lambda: ClusterClient(host="127.0.0.1", port=node.port))


@pytest.fixture
def single(redis_server: Redis) -> Server:
    return server_of(redis_server)


@pytest.fixture(params=["redis_server", "redis_cluster"])
def either(request: pytest.FixtureRequest) -> Server:
    return server_of(request.getfixturevalue(request.param))


def saves(expected: bytes | None, watermark: bytes, partitions: int = 4) -> list[Save]:
    """Make a save of two accounts for each partition, with its share of the notes."""
    return [
        Save(
            partition,
            expected,
            watermark,
            [f"A{partition}", "B"],
            [b"a%d" % partition + watermark, watermark],
            NOTES[partition::partitions],
        )
        for partition in range(partitions)
    ]


COUNTS = {1000: dict.fromkeys(MERCHANTS, 2), 1001: {"M0": 1}}


def test_what_a_poll_saves_is_what_the_next_one_loads(either: Server) -> None:
    async def go(stores: Opened) -> None:
        requests = [Load(partition, [f"A{partition}", "B", "C"]) for partition in range(4)]
        nothing = await stores.polls.load(requests, MERCHANTS)
        assert nothing == (await stores.states.load(requests), [None] * len(MERCHANTS))

        assert await stores.polls.save(saves(None, b"w1"), COUNTS) == [True] * 4

        loaded, profiles = await stores.polls.load(requests, MERCHANTS)
        assert [(one.watermark, one.states) for one in loaded] == [
            (b"w1", [b"a%dw1" % partition, b"w1", None]) for partition in range(4)
        ]
        assert profiles == await stores.merchants.load(MERCHANTS)
        assert await stores.counted() == 2 * len(MERCHANTS) + 1
        for note in NOTES:
            key = stores.note_key(note)
            expected = TransactionNote().with_score(note.decision, note.weight).to_bytes()
            assert stores.client.get(key) == expected
            assert 0 < stores.client.pttl(key) <= NOTE_EXPIRY_MS
        assert await stores.polls.load([], []) == ([], [])
        assert await stores.polls.save([], {}) == []

    either.run(go)


def test_a_repeated_save_stands_and_one_with_another_watermark_writes_no_state(
    either: Server,
) -> None:
    async def go(stores: Opened) -> None:
        first = saves(None, b"w1")
        assert await stores.polls.save(first, {}) == [True] * 4
        assert await stores.polls.save(first, {}) == [True] * 4
        late = saves(b"another", b"w9", 1) + saves(b"w1", b"w2")[1:]
        assert await stores.polls.save(late, {}) == [False, True, True, True]
        (loaded, _) = await stores.polls.load([Load(0, ["A0"]), Load(1, ["A1"])], [])
        assert [one.watermark for one in loaded] == [b"w1", b"w2"]
        assert [one.states for one in loaded] == [[b"a0w1"], [b"a1w2"]]

    either.run(go)


def test_on_one_redis_a_refused_save_writes_no_notes(single: Server) -> None:
    """The worker whose save stands writes them: its script does both or nothing."""

    async def go(stores: Opened) -> None:
        await stores.polls.save([Save(0, None, b"w1", [], [])], {})
        assert await stores.polls.save(saves(None, b"w2", 1), {}) == [False]
        assert stores.notes() == 0

    single.run(go)


def test_states_are_not_saved_while_a_note_cannot_be_written(either: Server) -> None:
    async def go(stores: Opened) -> None:
        blocked = stores.note_key(NOTES[-1])
        stores.client.lpush(blocked, "no string")
        with pytest.raises(StoreUnavailableError):
            await stores.polls.save(saves(None, b"w1", 1), {})
        (loaded, _) = await stores.polls.load([Load(0, ["A0", "B"])], [])
        assert (loaded[0].watermark, loaded[0].states) == (None, [None, None])

        stores.client.delete(blocked)
        assert await stores.polls.save(saves(None, b"w1", 1), {}) == [True]
        assert stores.notes() == len(NOTES)

    either.run(go)


def test_on_a_cluster_nothing_is_counted_while_states_cannot_be_saved(
    redis_cluster: RedisCluster,
) -> None:
    """A save that is repeated during a failover must count once."""
    server = server_of(redis_cluster)

    async def go(stores: Opened) -> None:
        stores.client.lpush(stores.keys.watermark(2), "no string")
        for _ in range(3):
            with pytest.raises(StoreUnavailableError):
                await stores.polls.save(saves(None, b"w1"), COUNTS)
        assert await stores.counted() == 0
        stores.client.delete(stores.keys.watermark(2))
        assert await stores.polls.save(saves(None, b"w1"), COUNTS) == [True] * 4
        assert await stores.counted() == 2 * len(MERCHANTS) + 1

    server.run(go)


def test_a_server_that_forgot_its_scripts_saves_and_counts_once(either: Server) -> None:
    async def go(stores: Opened) -> None:
        for turn in range(3):
            stores.client.script_flush()
            expected = b"w%d" % turn if turn else None
            stand = await stores.polls.save(saves(expected, b"w%d" % (turn + 1)), COUNTS)
            assert stand == [True] * 4
        assert await stores.counted() == 3 * (2 * len(MERCHANTS) + 1)

    either.run(go)


def test_a_load_is_checked_for_lost_keys_once_whatever_is_missing(either: Server) -> None:
    async def go(stores: Opened) -> None:
        checks = stores.states.loss_check = Checks()
        await stores.polls.save(saves(None, b"w1", 1), {1000: {"M0": 1}})
        for accounts, merchants in ((["A0"], ["M0"]), (["C"], ["M0"]), (["A0"], ["M0", "none"])):
            await stores.polls.load([Load(0, accounts)], merchants)
        assert checks.absent == [False, True, True]

    either.run(go)


def test_one_redis_answers_a_poll_in_two_round_trips(single: Server) -> None:
    async def go(stores: Opened) -> None:
        runs: list[int] = []
        held = stores.states.redis._held
        assert held is not None
        run = held.run

        async def counted(commands: Any) -> list[Any]:
            runs.append(len(commands))
            return await run(commands)

        await stores.polls.save(saves(None, b"w1"), COUNTS)  # loads the scripts
        held.run = counted  # type: ignore[method-assign]
        await stores.polls.load([Load(p, ["A"]) for p in range(4)], MERCHANTS)
        await stores.polls.save(saves(b"w1", b"w2"), COUNTS)
        assert len(runs) == 2

    single.run(go)


def test_answers_are_set_with_the_states_or_not_at_all(either: Server) -> None:
    content = bytes(16)
    score, later = (
        StoredAnswer("A", content, 7).to_bytes(),
        StoredAnswer("A", content, 9).to_bytes(),
    )
    rejected = StoredAnswer("R", content, reason="not_json").to_bytes()

    async def go(stores: Opened) -> None:
        def stored() -> list[bytes | None]:
            return [stores.client.get(k) for k in stores.keys.answers(1, ["t1", "t2"])]

        async def save(expected: bytes | None, new: bytes, *answers: tuple[str, bytes]) -> bool:
            request = Save(1, expected, new, ["A"], [new], NOTES[:2], answers)
            return (await stores.polls.save([request], {}))[0]

        assert await save(None, b"w1", ("t1", score), ("t2", rejected))
        assert stored() == [score, rejected]
        for key in stores.keys.answers(1, ["t1", "t2"]):
            assert 0 < stores.client.pttl(key) <= 86_400_000
        assert not await save(b"another", b"w2", ("t1", later))
        assert stored() == [score, rejected]
        assert await save(b"w1", b"w2", ("t1", rejected), ("t2", later))
        assert stored() == [score, later]
        assert await save(b"w2", b"w3", ("t1", later))
        assert stored() == [later, later]

    either.run(go)


def test_a_reply_reaches_the_subscriber_of_the_gateways_channel(either: Server) -> None:
    async def go(stores: Opened) -> None:
        node = stores.client.get_primaries()[0] if either.is_cluster else None
        client = stores.client if node is None else stores.client.get_redis_connection(node)
        channels = [stores.keys.replies("gw1"), stores.keys.replies("gw2")]
        with client.pubsub(ignore_subscribe_messages=True) as heard:
            heard.subscribe(*channels)
            heard.get_message(timeout=5)
            heard.get_message(timeout=5)
            await stores.polls.reply({})
            await stores.polls.reply({"gw1": b"\xff1", "gw2": b"2", "nobody": b"3"})
            found: dict[bytes, bytes] = {}
            while len(found) < 2:
                message = heard.get_message(timeout=10)
                assert message is not None, "no message came"
                found[message["channel"]] = message["data"]
        assert found == dict(zip(channels, [b"\xff1", b"2"], strict=True))

    either.run(go)
