"""States of another log: a topic created again, a changed partition count, an unknown format."""

from __future__ import annotations

import struct

import pytest

from pipeline.admin.rebuild_states import PartitionRebuild
from pipeline.errors import StartupError
from pipeline.kafka.polls import Chunk, Poll
from pipeline.messages.scores import decode_score
from pipeline.scoring import topic_id_cache
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, LogOffset
from tests.fakes.memory import MemoryStateStore
from tests.fakes.memory_workers import (
    MemoryWorker,
    World,
    finish,
)
from tests.pipeline.scoring.helpers import (
    die,
    nothing,
    read_on,
    rebuild,
    run_until_killed,
    save_elsewhere,
    when_nth,
)

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.mark.parametrize(
    ("watermark", "message"),
    [
        (Watermark(8, 0, 0, 1).to_bytes(), "had 8 partitions; it has 1.*RECUR_REDIS_KEY_PREFIX"),
        (
            Watermark(1, 9, 0, 1).to_bytes(),
            "past the end of transactions-0.*RECUR_REDIS_KEY_PREFIX",
        ),
        (b"of a version to come", "watermark of transactions-0.*RECUR_REDIS_KEY_PREFIX"),
    ],
    ids=["partition count", "log recreated", "format"],
)
def test_states_that_do_not_fit_the_log_end_the_worker_with_instructions(
    watermark: bytes, message: str
) -> None:
    world = World(topic_partitions=1)
    for _ in range(5):
        world.produce("A")
    world.store.watermarks[0] = watermark

    with pytest.raises(StartupError, match=message):
        finish(world.worker().run())

    assert world.scores(0) == {}
    assert world.store.watermarks == {0: watermark}


def test_scores_are_recovered_from_the_start_of_a_recreated_scores_topic() -> None:
    world = World(topic_partitions=1)
    for _ in range(20):
        world.produce("A")
    save_elsewhere(world, 0, Watermark(1, 0, scores_offset=10**6, writer=1))
    world.interrupt(when_nth("before save", 0, die))
    run_until_killed(world.worker())
    assert len(world.scores(0)) == 8

    read_on(world)

    world.assert_all_applied()


@pytest.mark.parametrize("is_emptied", [False, True], ids=["went back", "emptied"])
def test_an_offset_committed_for_an_earlier_log_hides_no_alert_after_a_loss(
    is_emptied: bool,
) -> None:
    """A late commit is ahead of the offset that the watermark names for the earlier log."""
    world = World(topic_partitions=1, on_new_log="begin", review_threshold=0.0)
    world.produce("A")
    finish(world.worker().run())
    old = world.store.watermarks[0]
    for topic in ("transactions", "alerts"):
        world.kafka.recreate(world.settings.topic(topic))
    world.store.states.clear()
    if is_emptied:
        world.store.watermarks.clear()
    assert is_emptied or Watermark.from_bytes(old).next_offset == 1
    generation = world.kafka.join("recur", "transactions", 0)
    world.kafka.commit("recur", "transactions", 0, 4, generation)
    worker = world.worker()
    if is_emptied:  # a worker loads the watermark of a new partition
        finish(worker.processor.process(Poll({0: Chunk(4, 4, [])})))
    for _ in range(6):
        world.produce("A")

    finish(worker.run())

    assert world.alerts() == {f"transactions:0:{offset}": 1 for offset in range(6)}


def test_a_recreated_topic_is_scored_from_its_start_after_a_rebuild() -> None:
    """Published scores have offsets of the earlier log, which mean other transactions."""
    world = World(topic_partitions=1)
    for _ in range(10):
        world.produce("A")
    finish(world.worker().run())
    world.kafka.recreate("transactions")
    world.produce("A", "t-new")
    with pytest.raises(
        StartupError, match=r"topic id \S+ then, \S+ now.*recur state rebuild --new-log"
    ):
        finish(world.worker().run())

    assert rebuild(world, 0) == PartitionRebuild(0, 0, 1)
    read_on(world)

    first, second = world.scores(0)[0]
    assert decode_score(second).transaction_id == "t-new"
    assert decode_score(second).features["transactions_seen"] == 1
    assert decode_score(first).transaction_id != "t-new"


@pytest.mark.parametrize("count", [5, 10, 25], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("runs_on", [True, False])
@pytest.mark.parametrize("policy", ["stop", "begin"])
def test_no_record_of_a_recreated_topic_is_skipped(
    count: int, runs_on: bool, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for a worker that starts and for one that runs on."""
    monkeypatch.setattr(topic_id_cache, "MAX_AGE_SECONDS", 0.0)
    world = World(topic_partitions=1, on_new_log=policy)
    for _ in range(10):
        world.produce("A")
    worker = world.worker()
    finish(worker.run())
    watermark = world.store.watermarks[0]
    world.kafka.recreate("transactions")
    for i in range(count):
        world.produce("A", f"new-{i}")

    async def go_on(worker: MemoryWorker) -> None:
        await worker.run()
        await worker.ownership.check_topic_id()  # a check without new records
        await worker.run()

    if policy == "stop":
        with pytest.raises(StartupError, match=r"topic id \S+ then, \S+ now"):
            finish(go_on(worker if runs_on else world.worker()))
        assert world.store.watermarks[0] == watermark
        assert all(len(said) == 1 for said in world.scores(0).values())
        assert len(world.scores(0)) == 10
        return
    finish(go_on(worker if runs_on else world.worker()))

    said = [decode_score(value) for values in world.scores(0).values() for value in values]
    new = {s.transaction_id: s for s in said if s.transaction_id.startswith("new-")}
    assert len(said) == 10 + count
    assert sorted(new) == sorted(f"new-{i}" for i in range(count))
    assert new["new-0"].features["transactions_seen"] == 1
    assert new[f"new-{count - 1}"].features["transactions_seen"] == count
    assert world.watermark(0) == count


def test_scores_of_an_earlier_log_are_not_used_for_the_new_one() -> None:
    """Redis lost its data, and with it the offset where the new log's scores start."""
    world = World(topic_partitions=1, on_new_log="begin")
    for _ in range(10):
        world.produce("A")
    finish(world.worker().run())
    world.kafka.recreate("transactions")
    for i in range(10):
        world.produce("A", f"new-{i}")
    finish(world.worker().run())
    before = world.scores(0)
    world.store.restore(MemoryStateStore())
    world.produce("A", "newest")

    read_on(world)

    assert {k: v for k, v in world.scores(0).items() if k < 10} == before
    assert [len(values) for _, values in sorted(world.scores(0).items())] == [2] * 10 + [1]


def test_a_watermark_without_topic_ids_adopts_the_current_ones() -> None:
    """An older version wrote the watermark."""
    world = World(topic_partitions=1)
    for _ in range(10):
        world.produce("A")
    finish(world.worker().run())
    mark = Watermark.from_bytes(world.store.watermarks[0])
    old = struct.pack("<B3xIqqQ", 1, 1, mark.next_offset, mark.scores_offset, 7)
    world.store.watermarks[0] = old
    assert Watermark.from_bytes(old).log_id == NO_ID
    world.produce("A")

    read_on(world)

    found = Watermark.from_bytes(world.store.watermarks[0])
    assert found.log_id == mark.log_id != NO_ID
    assert (found.scores_log_id, found.next_offset) == (mark.scores_log_id, 11)
    world.assert_all_applied()


@pytest.mark.parametrize("names", ["another log", "this log"])
def test_a_committed_offset_of_another_log_hides_no_alert(names: str) -> None:
    """A worker that outlived its topic may commit after the new log has grown past the offset."""
    world = World(topic_partitions=1, on_new_log="begin", review_threshold=0.0)
    kafka = world.kafka
    old = kafka.topic_id("transactions")
    kafka.recreate("transactions")
    new = kafka.topic_id("transactions")
    for _ in range(6):
        world.produce("A")
    generation = kafka.join("recur", "transactions", 0)
    offset = LogOffset(4, old if names == "another log" else new)
    kafka.commit("recur", "transactions", 0, offset, generation)
    worker = world.worker()

    async def take_and_run() -> None:
        await worker.processor.process(Poll({0: Chunk(4, 4, [])}))
        await worker.run()

    finish(take_and_run())

    hidden = 0 if names == "another log" else 4
    assert sorted(world.scores(0)) == list(range(6))
    assert world.alerts() == {f"transactions:0:{i}": 1 for i in range(hidden, 6)}


def test_committed_offsets_name_their_log() -> None:
    """This holds for acknowledged offsets and for those committed in a Kafka transaction."""
    for transactional in (False, True):
        world = World(
            topic_partitions=1,
            on_new_log="begin",
            processing_guarantee="exactly_once" if transactional else "at_least_once",
        )
        for _ in range(2):
            world.produce_many(20)
            finish(world.worker().run())

            committed = world.committed(0)
            assert isinstance(committed, LogOffset)
            assert committed == world.watermark(0) > 20
            assert committed.log_id == world.kafka.topic_id("transactions")
            world.kafka.recreate("transactions")


@pytest.mark.parametrize("has_states", [True, False])
def test_a_topic_recreated_during_a_takeover_is_started_and_not_rejected(
    has_states: bool,
) -> None:
    """The worker reads the id before the end, and the new log ends earlier than the old one."""
    world = World(topic_partitions=1, on_new_log="begin")
    world.produce_many(20)
    finish(world.worker().run())
    world.produce("A")
    if not has_states:
        world.store.restore(MemoryStateStore())

    def recreate() -> None:
        world.kafka.recreate("transactions")
        world.produce("A", "new-0")

    worker = world.worker()
    world.interrupt(when_nth("before bounds", 0, recreate))
    finish(worker.run())
    world.interrupt(nothing)
    finish(worker.ownership.check_topic_id())
    finish(worker.run())

    scores = [decode_score(value) for values in world.scores(0).values() for value in values]
    (new,) = [score for score in scores if score.transaction_id == "new-0"]
    assert new.features["transactions_seen"] == 1
    assert world.watermark(0) == 1


def test_a_new_group_starts_at_its_polls_begin_only_in_the_log_of_the_poll() -> None:
    """The group reads from the log's end. A poll of another log does not say where that is."""
    world = World(topic_partitions=1, on_new_log="begin", kafka_auto_offset_reset="latest")
    for _ in range(5):
        world.produce("A")
    worker = world.worker()
    finish(worker.ownership.learn_topic_id())
    worker.ownership.assign([0])
    world.kafka.recreate("transactions")
    for i in range(7):
        world.produce("A", f"new-{i}")

    async def take_and_run() -> None:
        await worker.processor.process(Poll({0: Chunk(5, 5, [])}))
        await worker.run()

    finish(take_and_run())

    assert sorted(world.scores(0)) == list(range(7))


def test_offsets_committed_for_a_truncated_end_hide_no_alert() -> None:
    """The id is the same, and the offset is ahead of the watermark: Redis was set back."""
    world = World(topic_partitions=1, review_threshold=0.0)
    for _ in range(10):
        world.produce("A")
    worker = world.worker()
    finish(worker.process(worker.consumer.poll(4) or Poll({})))
    earlier = world.store.copy()
    finish(worker.run())
    assert world.committed(0) == 10
    world.store.restore(earlier)
    del world.kafka._logs["transactions"][0].records[2:]
    world.kafka.recreate("alerts")

    assert rebuild(world, 0) == PartitionRebuild(0, 0, 2)
    for _ in range(12):
        world.produce("A")
    read_on(world)

    assert set(world.alerts()) >= {f"transactions:0:{i}" for i in range(2, 14)}


def test_an_applied_chunk_that_is_fetched_again_leaves_no_offset_behind() -> None:
    """The worker before died between save and commit, and no further record comes."""
    world = World(topic_partitions=1, on_new_log="begin")
    worker = world.worker()
    finish(worker.ownership.learn_topic_id())
    worker.ownership.assign([0])
    kafka = world.kafka
    kafka.recreate("transactions")
    for i in range(7):
        world.produce("A", f"new-{i}")
    finish(world.worker().run())
    generation = kafka.join("recur", "transactions", 0)
    offset = LogOffset(3, kafka.topic_id("transactions"))
    kafka.commit("recur", "transactions", 0, offset, generation)
    worker.rebalance([0])

    finish(worker.run())

    assert world.watermark(0) == world.committed(0) == 7
