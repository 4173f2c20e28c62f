"""One contract for every store of merchants: the fake, a real Redis and a real Redis Cluster."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.cluster import RedisCluster as ClusterClient

from model.features.merchant import BUCKETS
from pipeline.local.redis import Redis, RedisCluster
from pipeline.messages.decision import DECISIONS
from pipeline.settings import load_settings
from pipeline.storage.client import RIGHTS, StoreForbiddenError, StoreUnavailableError
from pipeline.storage.keys import MERCHANT_SLOTS, MerchantKeys, merchant_slot
from pipeline.storage.merchant_profile import FIXED_BYTES, Fraud, Profile
from pipeline.storage.merchant_store import (
    EXPIRY_MS,
    LabelOutcomes,
    MerchantLabel,
    MerchantStore,
    RedisMerchantStore,
)
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS, STALE, UNKNOWN, ScoredNote
from tests.fakes.memory import MemoryMerchantStore

ODD_IDS = ["a b", "é", "日本語", "{x}", "}{", "a:b", "a\nb", "\0", "%s", "x" * 256]
SERVERS = [pytest.param(name, marks=pytest.mark.live) for name in ("redis", "cluster")]


@dataclass
class Backend:
    """A server or fake for profiles; ``client`` reads the server directly, None in memory."""

    open: Callable[[], MerchantStore]
    client: Callable[[], Any] | None = None
    keys: MerchantKeys = field(default_factory=lambda: MerchantKeys("none"))
    stop: Callable[[], object] = field(default=lambda: None)
    start: Callable[[], object] = field(default=lambda: None)

    def run(self, test: Callable[[MerchantStore], Awaitable[None]]) -> None:
        """Run a test with a store, and close the store afterwards."""

        async def go() -> None:
            store = self.open()
            try:
                await test(store)
            finally:
                await store.close()

        asyncio.run(go())


def memory_backend() -> Backend:
    shared = MemoryMerchantStore()

    def switch(is_up: bool) -> Callable[[], None]:
        return lambda: setattr(shared, "is_up", is_up)

    return Backend(lambda: shared, stop=switch(False), start=switch(True))


def server_backend(server: Redis | RedisCluster) -> Backend:
    cluster = isinstance(server, RedisCluster)
    configured = load_settings(
        redis_url=server.url,
        redis_cluster=cluster,
        redis_timeout_seconds=1.0,
        redis_key_prefix=f"test-{uuid.uuid4().hex[:12]}",
    )
    host, port = server.url.removeprefix("redis://").removesuffix("/0").split(":")
    return Backend(
        lambda: RedisMerchantStore.from_settings(configured),
        (lambda: ClusterClient(host=host, port=int(port)))
        if isinstance(server, RedisCluster)
        else server.client,
        MerchantKeys(configured.redis_key_prefix),
        server.stop,
        server.start,
    )


@pytest.fixture(params=["memory", *SERVERS])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Provide each kind of store, on shared servers with keys of one test."""
    if request.param == "memory":
        return memory_backend()
    fixture = {"redis": "redis_server", "cluster": "redis_cluster"}[request.param]
    return server_backend(request.getfixturevalue(fixture))


@pytest.fixture(params=SERVERS)
def real_backend(request: pytest.FixtureRequest) -> Backend:
    """Provide the backends without the fake."""
    fixture = {"redis": "redis_server", "cluster": "redis_cluster"}[request.param]
    return server_backend(request.getfixturevalue(fixture))


@pytest.fixture(params=["memory", *SERVERS])
def stoppable(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Provide a server that the test may stop."""
    if request.param == "memory":
        yield memory_backend()
    else:
        with Redis() if request.param == "redis" else RedisCluster() as server:
            yield server_backend(server)


async def profile(store: MerchantStore, merchant: str) -> Profile:
    (value,) = await store.load([merchant])
    assert value is not None
    return Profile.from_bytes(value)


async def book(
    store: MerchantStore, partition: int, labels: Sequence[MerchantLabel]
) -> list[str | None]:
    """Record labels without a gap before them; return the decisions on their transactions."""
    end = labels[-1].offset + 1 if labels else 0
    booked = await store.record_labels(partition, labels, 0, end)
    assert booked.behind is None
    return booked.decisions


def fraud(offset: int, merchant: str, transaction: int, **changes: Any) -> MerchantLabel:
    """Make a label that became known at ``at``, with a ``weight`` or without."""
    fields = {"bucket": 1000, "known": 1028, "is_fraud": True, "at": 0, "weight": None} | changes
    told = fields["weight"]
    entry = Fraud(transaction, fields["bucket"], fields["known"], 255 if told is None else told)
    return MerchantLabel(
        offset,
        merchant,
        fields["is_fraud"],
        entry,
        fields["at"],
        has_weight=told is not None,
        is_late=fields.get("late", False),
    )


# counts ----------------------------------------------------------------------------------


def test_counts_add_up_in_their_merchants_buckets(backend: Backend) -> None:
    async def go(store: MerchantStore) -> None:
        assert await store.load(["M1", "M2"]) == [None, None]

        await store.add({100: {"M1": 2}, 101: {"M2": 1, "M1": 3}}, [])
        await store.add({101: {"M1": 4}, 99: {"M1": 1}}, [])

        one, two = [await profile(store, m) for m in ("M1", "M2")]
        assert (one.head, two.head) == (101, 101)
        assert one.counts[[99 % BUCKETS, 100, 101]].tolist() == [1, 2, 7]
        assert one.counts.sum() == 10
        assert two.counts.sum() == two.counts[101] == 1
        assert await store.load(["M3", "M1"]) == [None, one.to_bytes()]
        assert await store.load([]) == []
        await store.add({}, [])

    backend.run(go)


def test_merchants_may_have_any_name(backend: Backend) -> None:
    async def go(store: MerchantStore) -> None:
        await store.add({100: {name: i + 1 for i, name in enumerate(ODD_IDS)}}, [])
        await book(store, 0, [fraud(i, name, i) for i, name in enumerate(ODD_IDS)])

        for i, name in enumerate(ODD_IDS):
            found = await profile(store, name)
            assert found.counts.sum() == i + 1
            assert found.frauds == [Fraud(i, 1000, 1028)]

    backend.run(go)


def test_more_merchants_than_fit_one_script_call_are_counted(backend: Backend) -> None:
    names = [f"M{i}" for i in range(1500)]

    async def go(store: MerchantStore) -> None:
        counts: dict[int, dict[str, int]] = {}
        for i, name in enumerate(names):
            counts.setdefault(5000 + i % 3, {})[name] = 1 + i
        await store.add(counts, [])
        values = await store.load(names)
        for i, value in enumerate(values):
            assert value is not None
            assert len(value) == FIXED_BYTES
            found = Profile.from_bytes(value)
            assert found.head == 5000 + i % 3
            assert found.counts[found.head % BUCKETS] == found.counts.sum() == 1 + i

    backend.run(go)


histories = st.lists(
    st.dictionaries(
        st.integers(0, 400),
        st.dictionaries(st.sampled_from(["M1", "M2"]), st.integers(1, 40_000), min_size=1),
        max_size=4,
    ),
    max_size=8,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories)
@example(history=[{348: {"M1": 33_324}}, {28: {"M1": 32_212}}])  # full, and too old to count
@example(history=[{28: {"M1": 40_000}}, {28: {"M1": 40_000}}, {28: {"M1": 1}}])
def test_any_history_of_counts_gives_the_same_as_a_profile_in_python(
    redis_server: Redis, history: list[dict[int, dict[str, int]]]
) -> None:
    """The ring moves forward over any gap and any wrap; old buckets are skipped."""
    expected = {"M1": Profile(), "M2": Profile()}

    async def go(store: MerchantStore) -> None:
        for counts in history:
            await store.add(counts, [])
            for bucket, merchants in counts.items():
                for merchant, n in merchants.items():
                    expected[merchant].count(bucket, n)
        for merchant, wanted in expected.items():
            (value,) = await store.load([merchant])
            if wanted.head < 0:
                assert value is None
            else:
                assert value == wanted.to_bytes()

    server_backend(redis_server).run(go)


# labels ----------------------------------------------------------------------------------


def test_a_label_is_recorded_once_for_any_redelivery(backend: Backend) -> None:
    labels = [
        fraud(10, "M1", 1),
        fraud(11, "M2", 2),
        fraud(12, "M1", 3),
        fraud(15, "M1", 1, is_fraud=False),
    ]

    async def go(store: MerchantStore) -> None:
        await store.add({990: {"M1": 5}}, [])
        assert await store.recorded_to(0) == 0
        assert await book(store, 0, labels) == ["approve"] * 4
        after = await store.load(["M1", "M2"])

        for again in (labels, labels[3:], labels[1:3], labels[:2]):  # a zombie has a lower end
            assert await book(store, 0, again) == [None] * len(again)

        assert await store.load(["M1", "M2"]) == after
        one = await profile(store, "M1")
        assert one.frauds == [Fraud(3, 1000, 1028)]
        assert (one.head, int(one.counts.sum())) == (990, 5)
        assert await store.recorded_to(0) == 16
        assert await store.recorded_to(1) == 0

    backend.run(go)


def test_a_redelivered_label_does_not_undo_the_later_one(backend: Backend) -> None:
    """A zombie records the first part of the log again after its successor recorded all of it."""
    first, second = fraud(0, "M1", 1), fraud(1, "M1", 1, is_fraud=False)

    async def go(store: MerchantStore) -> None:
        assert await book(store, 0, [first, second]) == ["approve", "approve"]
        assert await book(store, 0, [first]) == [None]
        (value,) = await store.load(["M1"])
        assert value is None or Profile.from_bytes(value).frauds == []

    backend.run(go)


def test_nothing_is_recorded_past_a_gap(backend: Backend) -> None:
    """Otherwise the missing labels would count as recorded, and stay lost."""

    async def go(store: MerchantStore) -> None:
        first, second = fraud(3, "M1", 1), fraud(12, "M1", 2)
        assert await store.record_labels(0, [first], 0, 10) == LabelOutcomes(["approve"])
        assert await store.record_labels(0, [second], 12, 20) == LabelOutcomes([None], behind=10)
        assert await store.record_labels(0, [], 11, 20) == LabelOutcomes([], behind=10)
        assert await store.recorded_to(0) == 10
        assert (await profile(store, "M1")).frauds == [first.entry]

        assert await store.record_labels(0, [second], 10, 20) == LabelOutcomes(["approve"])
        assert await store.record_labels(0, [], 20, 30) == LabelOutcomes([])
        assert await store.recorded_to(0) == 30
        assert await store.record_labels(0, [fraud(50, "M1", 3)], 0, 51) == LabelOutcomes(
            ["approve"]
        )

    backend.run(go)


def test_a_new_labels_topic_is_recorded_from_its_start_and_others_stay(
    backend: Backend,
) -> None:
    one, other = bytes([1] * 16), bytes([2] * 16)

    async def go(store: MerchantStore) -> None:
        assert await store.labels_log(0, None) is None
        assert await store.labels_log(0, one) == one
        assert await store.labels_log(0, other) == one  # a stored id stays
        for partition in (0, 1):
            await store.record_labels(partition, [fraud(3, "M1", 1 + partition)], 0, 10)

        await store.begin_labels_log(0, other)

        assert await store.labels_log(0, one) == other
        assert [await store.recorded_to(partition) for partition in (0, 1)] == [0, 10]
        assert len((await profile(store, "M1")).frauds) == 2
        assert await store.record_labels(0, [fraud(3, "M1", 9)], 0, 10) == LabelOutcomes(
            ["approve"]
        )

    backend.run(go)


def test_more_labels_than_fit_one_script_call_are_recorded_once_each(backend: Backend) -> None:
    labels = [fraud(2 * i, f"M{i % 3}", i) for i in range(900)]

    async def go(store: MerchantStore) -> None:
        assert await store.record_labels(0, labels[:500], 0, 1000) == LabelOutcomes(
            ["approve"] * 500
        )
        again = await store.record_labels(0, labels[200:], 400, 1800)
        assert again == LabelOutcomes([None] * 300 + ["approve"] * 400)
        assert await store.recorded_to(0) == 1800
        for number in range(3):
            known = [f.id_hash for f in (await profile(store, f"M{number}")).frauds]
            assert known == list(range(number, 900, 3))

    backend.run(go)


def test_partitions_of_labels_are_independent(backend: Backend) -> None:
    async def go(store: MerchantStore) -> None:
        assert await book(store, 0, [fraud(7, "M1", 1)]) == ["approve"]
        assert await book(store, 1, [fraud(3, "M1", 2)]) == ["approve"]
        assert len((await profile(store, "M1")).frauds) == 2

    backend.run(go)


def test_a_legitimate_label_makes_no_profile(backend: Backend) -> None:
    async def go(store: MerchantStore) -> None:
        assert await book(store, 0, [fraud(0, "M1", 1, is_fraud=False)]) == ["approve"]
        assert await store.load(["M1"]) == [None]
        assert await book(store, 0, []) == []

    backend.run(go)


def test_a_profile_created_by_a_label_counts_transactions(backend: Backend) -> None:
    async def go(store: MerchantStore) -> None:
        await book(store, 0, [fraud(0, "M1", 1)])
        await store.add({1029: {"M1": 3}}, [])
        found = await profile(store, "M1")
        assert (found.head, int(found.counts.sum())) == (1029, 3)
        assert found.frauds == [Fraud(1, 1000, 1028)]

    backend.run(go)


def test_labels_return_the_decisions_on_their_transactions(backend: Backend) -> None:
    notes = [ScoredNote("M1", 1, "review"), ScoredNote("M2", 2, "decline")]

    async def go(store: MerchantStore) -> None:
        await store.add({1000: {"M1": 1}}, notes)
        await store.add({}, notes[:1])
        labels = [fraud(0, "M1", 1), fraud(1, "M2", 2, is_fraud=False), fraud(2, "M2", 3)]
        assert await book(store, 0, labels) == ["review", "decline", "approve"]

    backend.run(go)


def test_a_label_after_its_notes_expiry_returns_an_unknown_decision(
    backend: Backend,
) -> None:
    async def go(store: MerchantStore) -> None:
        await store.add({}, [ScoredNote("M1", 1, "decline")])
        labels = [fraud(0, "M1", 1, late=True), fraud(1, "M1", 2, late=True), fraud(2, "M1", 3)]
        assert await book(store, 0, labels) == ["decline", UNKNOWN, "approve"]

    backend.run(go)


def test_an_older_label_that_comes_later_changes_nothing(backend: Backend) -> None:
    """This holds for both kinds of labels, with or without an alert."""
    labels = [
        fraud(0, "M1", 1, at=500),
        fraud(1, "M1", 1, at=499, is_fraud=False),
        fraud(2, "M1", 2, at=800, is_fraud=False),
        fraud(3, "M1", 2, at=700),
        fraud(4, "M1", 3, at=300),
        fraud(5, "M1", 3, at=300, is_fraud=False),
        fraud(6, "M1", 1, at=400, known=1000, weight=7),
    ]

    async def go(store: MerchantStore) -> None:
        await store.add({}, [ScoredNote("M1", 1, "review")])
        told = await book(store, 0, labels[:4])
        told += await book(store, 0, labels)
        first, again = ["review", STALE, "approve", STALE], [None] * 4
        assert told == [*first, *again, "approve", "approve", STALE]
        assert (await profile(store, "M1")).frauds == [Fraud(1, 1000, 1028)]

    backend.run(go)


def test_a_fraud_gets_its_labels_weight_else_its_notes_else_the_full_weight(
    backend: Backend,
) -> None:
    notes = [ScoredNote("M1", 1, "approve", 40), ScoredNote("M1", 2, "decline", 50)]
    labels = [fraud(0, "M1", 1), fraud(1, "M1", 2, weight=60), fraud(2, "M1", 3)]

    async def go(store: MerchantStore) -> None:
        await store.add({}, notes)
        assert await book(store, 0, labels) == ["approve", "decline", "approve"]
        expected = {1: 40, 2: 60, 3: 255}
        assert {f.id_hash: f.weight for f in (await profile(store, "M1")).frauds} == expected

        # The label and the note come again: the label's own weight stays.
        assert await book(store, 0, [*labels, fraud(3, "M1", 2)]) == [None] * 3 + ["decline"]
        await store.add({}, notes)
        assert {f.id_hash: f.weight for f in (await profile(store, "M1")).frauds} == expected

    backend.run(go)


def test_a_note_that_comes_after_its_label_sets_the_weight_of_the_fraud(
    backend: Backend,
) -> None:
    """After a loss labels are recorded again at once, and notes once the log is read back."""

    async def go(store: MerchantStore) -> None:
        await book(store, 0, [fraud(0, "M1", 1, at=9), fraud(1, "M1", 2)])
        await store.add({1029: {"M1": 3}}, [ScoredNote("M1", 1, "review", 40)])
        assert (await profile(store, "M1")).frauds == [
            Fraud(1, 1000, 1028, 40),
            Fraud(2, 1000, 1028),
        ]
        # The time of the newest label stays: an older label still changes nothing.
        again = [fraud(2, "M1", 1, at=8, is_fraud=False), fraud(3, "M1", 1, at=9)]
        assert await book(store, 0, again) == [STALE, "review"]
        assert (await profile(store, "M1")).counts.sum() == 3

    backend.run(go)


steps_of_one_partition = st.lists(
    st.tuples(
        st.sampled_from(["M1", "M2"]),
        st.integers(0, 4),
        st.integers(1000, 1500),
        st.integers(0, 60),
        st.sampled_from(["fraud", "legitimate", "note"]),
        st.integers(0, 5),
        st.one_of(st.none(), st.integers(0, 255)),
    ),
    max_size=30,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=steps_of_one_partition)
def test_any_order_of_labels_and_notes_gives_the_same_as_the_store_in_python(
    redis_server: Redis, drawn: list[tuple[str, int, int, int, str, int, int | None]]
) -> None:
    expected = MemoryMerchantStore()

    async def go(store: MerchantStore) -> None:
        for offset, (merchant, transaction, bucket, delay, what, at, weight) in enumerate(drawn):
            if what == "note":
                decision = DECISIONS[at % 3]
                noted = ScoredNote(
                    merchant, transaction, decision, 255 if weight is None else weight
                )
                for each in (store, expected):
                    await each.add({}, [noted])
                continue
            label = fraud(
                offset,
                merchant,
                transaction,
                bucket=bucket,
                known=bucket + delay,
                is_fraud=what == "fraud",
                at=at,
                weight=weight,
                late=delay > 50,
            )
            assert await book(store, 0, [label]) == await book(expected, 0, [label])
        for merchant in ("M1", "M2"):
            values = await store.load([merchant])
            assert values == await expected.load([merchant])

    server_backend(redis_server).run(go)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=steps_of_one_partition)
def test_labels_recorded_together_give_the_same_as_one_by_one(
    redis_server: Redis, drawn: list[tuple[str, int, int, int, str, int, int | None]]
) -> None:
    expected = MemoryMerchantStore()
    labels = [
        fraud(i, m, t, bucket=b, known=b + d, is_fraud=what == "fraud", at=at, weight=weight)
        for i, (m, t, b, d, what, at, weight) in enumerate(drawn)
    ]

    async def go(store: MerchantStore) -> None:
        await book(store, 0, labels[: len(labels) // 2])
        await book(store, 0, labels[len(labels) // 4 :])
        for label in labels:
            await book(expected, 0, [label])
        for merchant in ("M1", "M2"):
            assert await store.load([merchant]) == await expected.load([merchant])

    server_backend(redis_server).run(go)


# real servers ----------------------------------------------------------------------------


def test_profiles_and_notes_expire_and_watermarks_do_not(real_backend: Backend) -> None:
    keys = real_backend.keys

    async def go(store: MerchantStore) -> None:
        await store.add({1000: {"M1": 1}}, [ScoredNote("M1", 7, "review")])
        await book(store, 3, [fraud(0, "M2", 1)])

    real_backend.run(go)
    assert real_backend.client is not None
    with real_backend.client() as client:
        for merchant in ("M1", "M2"):
            assert EXPIRY_MS - 60_000 < client.pttl(keys.profile(merchant)) <= EXPIRY_MS
        slot = merchant_slot("M1")
        for of, transaction in ((slot, 7), (merchant_slot("M2"), 1)):
            left = client.pttl(keys.note(of, transaction))
            assert NOTE_EXPIRY_MS - 60_000 < left <= NOTE_EXPIRY_MS
        watermark = keys.labels_watermark(merchant_slot("M2"), "labels", 3)
        assert client.pttl(watermark) == -1


def test_a_cluster_node_that_lost_labels_is_found_and_gets_them_again(
    real_backend: Backend,
) -> None:
    """A lagging replica replaces one of several primaries."""
    keys = real_backend.keys
    labels = [fraud(i, f"M{i % 40}", i) for i in range(100)]
    lost = merchant_slot("M7")
    assert real_backend.client is not None
    with real_backend.client() as client:

        async def go(store: MerchantStore) -> None:
            await store.record_labels(0, labels[:60], 0, 60)
            client.set(keys.labels_watermark(lost, "labels", 0), 20)
            for number in range(40):
                if merchant_slot(f"M{number}") == lost:
                    client.delete(keys.profile(f"M{number}"))

            assert await store.recorded_to(0) == 20
            found = await store.record_labels(0, labels[60:], 60, 100)
            assert found.behind == 20
            for label, decision in zip(labels[60:], found.decisions, strict=True):
                is_lost = merchant_slot(label.merchant_id) == lost
                assert decision == (None if is_lost else "approve")

            again = await store.record_labels(0, labels[20:], 20, 100)
            assert again.behind is None
            for label, decision in zip(labels[20:], again.decisions, strict=True):
                is_lost = merchant_slot(label.merchant_id) == lost
                assert decision == ("approve" if is_lost else None)

        real_backend.run(go)


def test_counting_extends_the_life_of_a_profile(real_backend: Backend) -> None:
    key = real_backend.keys.profile("M1")
    assert real_backend.client is not None
    with real_backend.client() as client:

        async def go(store: MerchantStore) -> None:
            await store.add({1000: {"M1": 1}}, [])
            client.pexpire(key, 60_000)
            await store.add({1000: {"M1": 1}}, [])
            assert client.pttl(key) <= 60_000, "one more call for each transaction"
            await store.add({1004: {"M1": 1}}, [])
            assert client.pttl(key) > 60_000

        real_backend.run(go)


def test_a_profile_in_another_format_starts_empty(real_backend: Backend) -> None:
    key = real_backend.keys.profile("M1")
    assert real_backend.client is not None
    with real_backend.client() as client:

        async def go(store: MerchantStore) -> None:
            client.set(key, b"\xff" * 400)
            await store.add({1000: {"M1": 2}}, [])
            assert (await profile(store, "M1")).counts.sum() == 2
            client.set(key, b"\x01" * 10)
            await book(store, 0, [fraud(0, "M1", 1)])
            assert (await profile(store, "M1")).frauds == [Fraud(1, 1000, 1028)]

        real_backend.run(go)


def test_a_server_that_lost_its_scripts_gets_them_again(real_backend: Backend) -> None:
    assert real_backend.client is not None
    with real_backend.client() as client:

        async def go(store: MerchantStore) -> None:
            for turn in range(2):
                await store.add({1000: {"M1": 1}}, [])
                await book(store, 0, [fraud(turn, "M1", turn)])
                client.script_flush()
            found = await profile(store, "M1")
            assert (int(found.counts.sum()), len(found.frauds)) == (2, 2)

        real_backend.run(go)


def test_a_stopped_server_is_unavailable_until_it_returns(stoppable: Backend) -> None:
    async def until_back(store: MerchantStore) -> None:
        """Repeat a call as :class:`pipeline.scoring.retry.Retrier` does."""
        for _ in range(100):
            try:
                await store.load(["M1"])
                await store.recorded_to(0)
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
            else:
                return
        raise AssertionError("it is back and the store does not notice")

    async def go(store: MerchantStore) -> None:
        await store.add({1000: {"M1": 1}}, [])
        await asyncio.to_thread(stoppable.stop)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: store.load(["secret-merchant", "M1"]),
            lambda: store.add({1: {"secret-merchant": 1}}, []),
            lambda: book(store, 0, [fraud(0, "secret-merchant", 1)]),
            lambda: store.recorded_to(0),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailableError) as caught:
                await call()
            assert "secret-merchant" not in str(caught.value)
        await asyncio.to_thread(stoppable.start)
        await until_back(store)
        await store.add({1000: {"M1": 1}}, [])
        assert await book(store, 0, [fraud(0, "M1", 1)]) == ["approve"]

    stoppable.run(go)


@pytest.mark.live
@pytest.mark.parametrize("missing", ["+bitfield", "+setrange", "+pexpire", "+mget", "+set"])
def test_a_missing_right_raises_at_once_and_names_the_rights(missing: str) -> None:
    rights = [right for right in RIGHTS.split() if right != missing]

    async def go(store: MerchantStore) -> None:
        await store.add({1000: {"secret-merchant": 1}}, [])
        await store.add({1004: {"secret-merchant": 1}}, [])
        await store.load(["secret-merchant"])

    with Redis() as server, server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "recur", "on", ">of-redis", "~*", *rights)
        configured = load_settings(
            redis_url=server.url, redis_username="recur", redis_password="of-redis"
        )
        backend = Backend(lambda: RedisMerchantStore.from_settings(configured))
        with pytest.raises(StoreForbiddenError, match=r"grant .*\+bitfield") as caught:
            backend.run(go)
        assert "secret" not in str(caught.value)
        admin.execute_command("ACL", "SETUSER", "recur", missing)
        backend.run(go)


def test_all_keys_of_a_script_call_lie_in_one_slot() -> None:
    keys = MerchantKeys("recur")
    names = [keys.profile(m) for m in ODD_IDS]
    assert len(set(names)) == len(ODD_IDS)
    for merchant, name in zip(ODD_IDS, names, strict=True):
        slot = merchant_slot(merchant)
        tag = b"{%d}" % slot
        assert name.split(b"}")[0] + b"}" == b"recur:merchant:" + tag
        assert tag in keys.labels_watermark(slot, "labels", 0)
        assert tag in keys.note(slot, 1)
        assert 0 <= slot < MERCHANT_SLOTS
    assert np.unique([merchant_slot(f"M{i}") for i in range(5000)]).size == MERCHANT_SLOTS
