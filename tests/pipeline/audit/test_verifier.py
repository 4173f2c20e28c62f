"""`recur verify` on a log and a store in memory: it finds each fault, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from model.features.spec import INPUTS
from pipeline.audit import recompute as recompute_module
from pipeline.audit import score_reader as score_reader_module
from pipeline.audit import verifier as verifier_module
from pipeline.audit.report import describe, to_json
from pipeline.audit.result import Difference, Verification
from pipeline.audit.verifier import VerifyOptions
from pipeline.errors import RecurError
from pipeline.messages.scores import decode_score
from pipeline.scoring.scorer import Scorer
from pipeline.storage.watermark import Watermark
from tests.fakes.memory_verify import NoBar, StoreOfWorld, verify_world
from tests.fakes.memory_workers import DAY_MS, World, finish, small_checkpoint


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a short log take several micro-batches, loads and reads of scores."""
    monkeypatch.setattr(recompute_module, "MICRO_BATCH", 7)
    monkeypatch.setattr(score_reader_module, "LOOKAHEAD", 10)
    monkeypatch.setattr(score_reader_module, "READ_MAX", 5)
    monkeypatch.setattr(verifier_module, "LOAD_ACCOUNTS", 2)


def world_of(count: int = 120, accounts: int = 6, **settings: Any) -> World:
    """Make a log with repeats and rejects, applied by a worker; no state has expired."""
    world = World(small_checkpoint(inputs=INPUTS), log_retention_days=36_000, **settings)
    world.produce_many(count, accounts)
    finish(world.worker().run())
    return world


def a_state(world: World) -> tuple[int, str]:
    return sorted(world.store.states)[1]


def last_of(world: World, partition: int, account: str) -> int:
    """Return the offset of the account's last scored transaction."""
    scores = world.scores(partition)
    return max(o for o, (value, *_) in scores.items() if decode_score(value).account_id == account)


def publish_again(world: World, partition: int, offset: int, **changes: Any) -> None:
    """Publish a further score of a transaction."""
    score = decode_score(world.scores(partition)[offset][0])
    value = msgspec.json.encode(msgspec.structs.replace(score, **changes))
    key = score.account_id.encode()
    world.kafka.produce(world.settings.topic("scores"), key, value, partition=partition)


def lose_score(world: World, partition: int, offset: int) -> None:
    """Replace a transaction's score by a record that is no score."""
    for record in world.kafka.records(world.settings.topic("scores"), partition):
        if decode_score(record.value or b"").source == f"{world.topic}:{partition}:{offset}":
            score = decode_score(record.value or b"")
            record.value = msgspec.json.encode(msgspec.structs.replace(score, decision="lost"))
            return
    raise AssertionError(f"there is no score of {offset}")


def test_a_forgotten_account_is_right_without_a_state_or_with_a_new_one() -> None:
    """This holds in any micro-batch. A state that still exists is a difference."""
    world = world_of()
    place = partition, account = a_state(world)
    kept = world.store.states[place]
    world.forget(account)
    world.produce("other")
    finish(world.worker().run())
    assert place not in world.store.states
    assert verify_world(world).is_right

    world.store.states[place] = kept
    found = verify_world(world)
    assert [(item.account_id, item.partition) for item in found.differences] == [
        (account, partition)
    ]
    del world.store.states[place]

    world.produce(account)
    finish(world.worker().run())
    found = verify_world(world)
    assert found.is_right
    assert not found.unverifiable


def test_an_account_with_no_record_but_its_forgetting_is_right() -> None:
    world = World(small_checkpoint(inputs=INPUTS), log_retention_days=36_000)
    world.forget("never seen")
    world.produce_raw(b"rejected", b"not a transaction")
    finish(world.worker().run())
    found = verify_world(world)
    assert found.is_right
    assert found.accounts == 0


def test_during_a_rebuild_states_past_the_watermark_count_as_absent() -> None:
    world = world_of()
    for account in ("late", "late too", "last of all"):
        world.produce(account)
        finish(world.worker().run())
    stale = dict(world.store.states)
    for partition in world.partitions:
        finish(world.rebuild().reset(partition))
    world.produce(world.account_in(0))
    world.produce(world.account_in(1))
    worker = world.worker()
    for _ in range(4):  # the first poll finds that the log must be read from its begin
        poll = worker.consumer.poll(8)
        assert poll is not None
        finish(worker.process(poll))
    assert 0 < world.watermark(0) < world.kafka.bounds(world.topic, 0).end
    assert any(world.store.states[place] == value for place, value in stale.items())

    assert verify_world(world).is_right


def test_a_state_moved_from_another_partition_is_unverifiable() -> None:
    world = world_of()
    codec = Scorer(world.checkpoint, 1).codec
    moved = world.account_in(0, 7)
    for account in (moved, world.account_in(0, 8)):
        states, _, _ = codec.decode([world.store.states[a_state(world)]])
        states.first_offset[:] = states.last_offset[:] = -1
        (world.store.states[0, account],) = codec.encode(states, np.arange(1))
    world.produce(moved)
    finish(world.worker().run())

    found = verify_world(world)

    assert {account for account, _, _ in found.unverifiable} == {moved, world.account_in(0, 8)}
    assert not found.differences


def test_the_states_and_scores_of_workers_are_right_and_all_are_checked() -> None:
    """The log has repeats, rejects and warm records; the counts leave none out."""
    world = world_of()
    bar = NoBar()

    found = verify_world(world, bar=bar)

    expected = world.references()
    assert found.is_right
    assert found.records == sum(len(world.kafka.records(world.topic, p)) for p in range(2))
    assert found.transactions == found.scores == sum(len(r.scores) for r in expected)
    assert found.accounts == found.right == sum(len(r.accounts) for r in expected) > 4
    assert (found.missing, found.duplicate, found.conflicting, found.unexpected) == (0, 0, 0, 0)
    assert (found.unverifiable_accounts, found.unverifiable_scores, found.without_log) == (0, 0, 0)
    assert bar.fraction == 1.0


def test_a_different_hidden_state_is_found_with_account_and_distance() -> None:
    """A state with a valid checksum and other contents: all scores are right."""
    world = world_of()
    place = a_state(world)
    codec = Scorer(world.checkpoint, ttl_ms=1).codec
    states, _, _ = codec.decode([world.store.states[place]])
    states.hidden[0, 0, 3] += np.float16(0.25)
    world.store.states[place] = codec.encode(states, np.arange(1))[0]

    found = verify_world(world)

    (difference,) = found.differences
    assert (difference.partition, difference.account_id) == place
    assert difference.what == "the hidden state differs"
    assert difference.offset is None
    assert found.largest_hidden == pytest.approx(0.25, abs=0.01)
    assert difference.hidden == pytest.approx(found.largest_hidden)
    assert found.right == found.accounts - 1
    assert not found.is_right
    assert verify_world(world, tolerance_hidden=0.3).is_right


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (lambda value: None, "no state in Redis"),
        (lambda value: value[:-1] + bytes([value[-1] ^ 1]), "of another format or damaged"),
        (lambda value: value + b"12345678", "of another format or damaged"),
    ],
)
def test_a_missing_or_damaged_state_is_a_difference(
    fault: Callable[[bytes], bytes | None], what: str
) -> None:
    """Neither is right, although a worker would treat both as a new account."""
    world = world_of()
    place = a_state(world)
    value = fault(world.store.states[place])
    if value is None:
        del world.store.states[place]
    else:
        world.store.states[place] = value

    found = verify_world(world)

    assert [(d.partition, d.account_id, d.what) for d in found.differences] == [(*place, what)]
    assert not found.is_right


def test_an_older_state_and_one_applied_twice_are_differences() -> None:
    """Both have a valid checksum; their bookkeeping shows the fault."""
    world = world_of(count=60)
    old = dict(world.store.states)
    for place in old:
        world.produce(place[1])
    finish(world.worker().run())
    first, second = sorted(old)[:2]
    codec = Scorer(world.checkpoint, ttl_ms=1).codec
    states, _, _ = codec.decode([world.store.states[second]])
    states.history.count[:] += 1
    world.store.states[first] = old[first]
    world.store.states[second] = codec.encode(states, np.arange(1))[0]

    found = verify_world(world)

    assert {(d.partition, d.account_id): d.what for d in found.differences} == {
        first: "its last transaction is another",
        second: "aggregates or ids differ",
    }


def test_a_state_with_another_begin_is_reported_with_its_offset() -> None:
    """A worker treats a damaged state as absent, so later scores differ."""
    world = world_of()
    place = a_state(world)
    world.store.states[place] = b"damaged"
    _, begun = world.produce(place[1], amount=20.0)
    world.produce(place[1])
    finish(world.worker().run())

    found = verify_world(world, tolerance_score=1e-3)

    (difference,) = found.differences
    assert difference.what == "began at another offset"
    assert difference.offset == begun
    assert not found.is_right


def test_duplicate_scores_are_distinguished_from_conflicting_ones() -> None:
    """The same score again is allowed (at least once); another score is a conflict."""
    world = world_of()
    partition, account = a_state(world)
    offset = last_of(world, partition, account)
    publish_again(world, partition, offset)
    found = verify_world(world)
    assert found.is_right
    assert (found.duplicate, found.conflicting) == (1, 0)

    value = decode_score(world.scores(partition)[offset][0]).score
    publish_again(world, partition, offset, score=float(np.nextafter(np.float32(value), 2)))
    found = verify_world(world)
    assert (found.duplicate, found.conflicting) == (1, 1)
    assert found.first_conflicting == (partition, offset)
    assert not found.is_right


def test_the_first_offset_of_a_wrong_score_is_reported() -> None:
    """The state is right, so only the score shows the fault."""
    world = world_of()
    partition, account = a_state(world)
    offset = last_of(world, partition, account)
    for record in world.kafka.records(world.settings.topic("scores"), partition):
        score = decode_score(record.value or b"")
        if score.source == f"{world.topic}:{partition}:{offset}":
            changed = msgspec.structs.replace(score, score=(score.score + 0.5) % 1)
            record.value = msgspec.json.encode(changed)

    found = verify_world(world)

    (difference,) = found.differences
    assert (difference.account_id, difference.offset) == (account, offset)
    assert difference.what == "the state is right, scores are not"
    assert found.largest_score == pytest.approx(0.5, abs=0.02)
    assert not found.is_right


def test_a_missing_score_is_counted_and_its_account_is_unverifiable() -> None:
    """The merchant's features are lost with the score, so the state cannot be computed."""
    world = world_of()
    partition, account = a_state(world)
    offset = last_of(world, partition, account)
    lose_score(world, partition, offset)

    found = verify_world(world)

    assert found.missing == 1
    assert found.first_missing == (partition, offset)
    assert [(p, a) for a, p, _ in found.unverifiable] == [(partition, account)]
    assert found.different_accounts == 0
    assert not found.is_right


def test_a_late_score_is_found_and_counts_as_the_first() -> None:
    """Scores published again after a loss lie far behind those of later transactions."""
    world = world_of()
    for partition in range(2):
        scores = sorted(world.scores(partition))
        for offset in (scores[0], scores[1], scores[5]):
            publish_again(world, partition, offset)
            lose_score(world, partition, offset)

    found = verify_world(world)

    assert found.is_right
    assert (found.missing, found.duplicate, found.conflicting) == (0, 0, 0)
    assert found.scores == found.transactions


def test_a_score_of_a_repeat_is_not_due() -> None:
    """Two scores under two offsets mean that a transaction was applied twice."""
    world = world_of()
    partition = 0
    (repeat, *_) = world.references()[partition].repeated
    some = sorted(world.scores(partition))[0]
    record = next(r for r in world.kafka.records(world.topic, partition) if r.offset == repeat)
    score = decode_score(world.scores(partition)[some][0])
    forged = msgspec.structs.replace(score, source=f"{world.topic}:{partition}:{repeat}")
    topic = world.settings.topic("scores")
    world.kafka.produce(topic, record.key, msgspec.json.encode(forged), partition=partition)

    found = verify_world(world)

    assert found.unexpected == 1
    assert not found.is_right


def test_accounts_with_a_history_before_the_log_are_unverifiable() -> None:
    """The topic that lost more decides. Accounts that began later are verified."""
    world = world_of(count=60)
    begun = set(world.store.states)
    for partition in range(2):
        scores = sorted(world.scores(partition))
        world.kafka.delete_records(world.topic, partition, scores[4])
        world.kafka.delete_records(world.settings.topic("scores"), partition, 8)
    for i in range(3):
        world.produce(f"N{i}")
        world.produce(f"N{i}")
    finish(world.worker().run())

    found = verify_world(world)

    verified = set(world.store.states) - {(p, a) for a, p, _ in found.unverifiable}
    early = {place for place in begun if first_offset(world, place) < scored_from(world, place[0])}
    assert len(early) >= 3
    assert verified == set(world.store.states) - early
    assert found.accounts == found.right == len(verified) >= 3
    assert found.unverifiable_scores > 0
    assert found.scores >= 6
    assert found.is_right

    del world.store.states[next(place for place in world.store.states if place[1] == "N1")]
    assert not verify_world(world).is_right


def first_offset(world: World, place: tuple[int, str]) -> int:
    states, _, _ = Scorer(world.checkpoint, ttl_ms=1).codec.decode([world.store.states[place]])
    return int(states.first_offset[0])


def scored_from(world: World, partition: int) -> int:
    """Return the source of the first remaining score."""
    return min(world.scores(partition))


def test_a_group_that_began_at_the_end_of_the_log_owes_no_earlier_scores() -> None:
    """Workers never read the records before their start if the policy is `latest`."""
    world = World(
        small_checkpoint(inputs=INPUTS), kafka_auto_offset_reset="latest", log_retention_days=36_000
    )
    world.produce_many(30)
    worker = world.worker()
    world.produce_many(60, seed=4)
    finish(worker.run())

    found = verify_world(world)

    assert found.is_right
    assert found.accounts == found.right == len(world.store.states)
    assert found.scores == found.transactions > 40
    assert found.unverifiable_accounts == 0
    del world.store.states[a_state(world)]
    assert not verify_world(world).is_right


def test_expired_states_are_no_difference() -> None:
    """Redis expires states after their time to live plus the retention."""
    world = World(small_checkpoint(inputs=INPUTS))  # its records are years old
    world.produce_many(40)
    finish(world.worker().run())
    del world.store.states[a_state(world)]

    found = verify_world(world)

    assert found.expired == 1
    assert found.is_right


def test_a_state_that_starts_over_after_its_time_to_live_is_right() -> None:
    """The worker's rule counts: the time between records, not until now."""
    world = world_of(count=60)
    for place in sorted(world.store.states):
        world.now_ms += 31 * DAY_MS
        world.produce(place[1])
    finish(world.worker().run())

    found = verify_world(world)

    assert found.is_right
    assert found.accounts == len(world.store.states)


def test_a_state_without_a_log_is_a_difference_in_any_partition() -> None:
    """One account has no transaction; another has states in two partitions."""
    world = world_of()
    partition, account = a_state(world)
    world.store.states[partition, "nobody"] = world.store.states[partition, account]
    world.store.states[1 - partition, account] = world.store.states[partition, account]

    found = verify_world(world)

    assert found.without_log == 2
    assert {(d.partition, d.account_id) for d in found.differences} == {
        (partition, "nobody"),
        (1 - partition, account),
    }
    assert verify_world(world, account=account).without_log == 1

    store = StoreOfWorld(world)
    store.may_list = False
    assert verify_world(world, store).without_log is None


def test_a_sample_and_a_single_account_ignore_all_others() -> None:
    """A sample has the same accounts in every run; faults of others have no effect."""
    world = world_of(count=60, accounts=9)
    everything = verify_world(world)
    hit = 0
    for place in list(world.store.states):
        value = world.store.states.pop(place)
        found = verify_world(world, sample=4)
        assert found.accounts == 4
        assert found.transactions < everything.transactions
        hit += not found.is_right
        world.store.states[place] = value
    assert hit == 4
    partition, account = a_state(world)
    assert verify_world(world, account=account).accounts == 1
    del world.store.states[partition, account]
    assert not verify_world(world, account=account).is_right
    assert verify_world(world, account=sorted(world.store.states)[0][1]).is_right


def test_a_time_range_bounds_the_scores_and_not_the_states() -> None:
    """States depend on the whole log; only scores have a range."""
    world = world_of()
    records = sorted(
        record.timestamp for p in range(2) for record in world.kafka.records(world.topic, p)
    )
    start, stop = records[30], records[60]

    found = verify_world(world, from_ms=start, to_ms=stop)

    due = [
        offset
        for p, reference in enumerate(world.references())
        for record in world.kafka.records(world.topic, p)
        if (offset := record.offset) in reference.scores and start <= record.timestamp < stop
    ]
    assert found.scores == len(due)
    assert found.accounts == len(world.store.states)
    (partition, account) = a_state(world)
    lose_score(world, partition, last_of(world, partition, account))
    assert verify_world(world, from_ms=start, to_ms=stop).missing == 0
    assert verify_world(world, from_ms=start).missing == 1


def test_each_state_is_compared_at_the_watermark_that_it_was_loaded_with() -> None:
    """Workers apply more between any two loads, and this causes no difference."""
    world = world_of(count=60)
    world.produce_many(15, accounts=9, seed=9)
    applied: list[int] = []

    def work() -> None:
        finish(world.worker().run())  # applies logged records that have no score yet
        world.produce_many(15, accounts=9, seed=len(applied))
        applied.append(1)

    found = verify_world(world, StoreOfWorld(world, work))

    assert len(applied) > 2
    assert found.is_right
    assert found.accounts == found.right > 4
    assert verify_world(world).records > found.records


def test_scores_published_during_the_verification_are_read() -> None:
    """Workers apply logged transactions while the states are loaded."""
    world = world_of(count=60)
    world.produce_many(40, seed=9)

    found = verify_world(world, StoreOfWorld(world, lambda: finish(world.worker().run())))

    assert found.is_right
    assert found.accounts == found.right == len(world.store.states)
    assert found.not_applied >= 40


def test_a_watermark_that_goes_back_meanwhile_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Redis loses data meanwhile, the partition is verified again from the start."""
    world = world_of(count=40)
    before = world.store.copy()
    world.produce_many(40, seed=5)
    finish(world.worker().run())
    times: list[int] = []

    def lose() -> None:
        if not times:
            world.store.restore(before)
        times.append(1)

    found = verify_world(world, StoreOfWorld(world, lose))

    assert found.is_right
    assert found.not_applied > 0

    marks = iter(range(1000, 0, -1))

    def keep_losing() -> None:
        for partition, value in world.store.watermarks.items():
            mark = Watermark.from_bytes(value)
            world.store.watermarks[partition] = Watermark(
                mark.partitions, max(0, mark.next_offset - 1), mark.scores_offset, next(marks)
            ).to_bytes()

    with pytest.raises(RecurError, match="went back 3 times"):
        verify_world(world, StoreOfWorld(world, keep_losing))


def test_a_partition_with_scores_but_no_watermark_is_reported() -> None:
    """An empty Redis does not count as right."""
    world = world_of()
    world.store.watermarks.clear()
    world.store.states.clear()

    found = verify_world(world)

    assert found.lost_partitions == [0, 1]
    assert not found.is_right
    assert verify_world(World(small_checkpoint())).is_right, "nothing was ever written"


def test_scores_of_another_model_are_counted_and_not_compared() -> None:
    """A new model keeps the old model's published scores; the states are its own."""
    world = world_of(count=40)
    world.checkpoint = small_checkpoint(seed=8, inputs=INPUTS)
    world.store.watermarks.clear()
    world.store.states.clear()
    finish(world.worker().run())
    world.produce_many(20, seed=3)
    finish(world.worker().run())

    found = verify_world(world)

    assert found.is_right
    assert found.foreign_model > 20
    assert 0 < found.scores < found.transactions


def test_counts_of_partitions_add_up() -> None:
    """The report sums all partitions; the first position of a kind stays."""
    one, other = Verification(scores=3, missing=1, first_missing=(0, 7)), Verification(scores=4)
    other.largest_hidden, other.first_missing = 0.5, (1, 2)
    total = Verification()
    total.add(one)
    total.add(other)
    assert (total.scores, total.missing, total.first_missing) == (7, 1, (0, 7))
    assert total.largest_hidden == 0.5


def test_the_report_names_what_differs_and_what_cannot_be_verified() -> None:
    """The text has counts, first positions, accounts, and the number not listed."""
    found = Verification(records=1_000, scores=990, missing=2, first_missing=(3, 77))
    found.conflicting, found.first_conflicting = 1, (2, 5)
    for i in range(30):
        found.add_difference(Difference(f"D{i}", 1, "the hidden state differs", None, 0.5, 1e-9))
    found.add_difference(Difference("E", 1, "began at another offset", 123, None, None))
    found.add_unverifiable("U", 2, "began before the log does")
    found.without_log = None
    found.lost_partitions = [4]

    text = "\n".join(describe(found, VerifyOptions(), "0f3a", 0.5))

    for words in [
        "model 0f3a",
        "1,000 records",
        "(2,000/s)",
        "2 missing (first: partition 3, offset 77)",
        "1 conflicting (first: partition 2, offset 5)",
        "grant +scan",
        "partition 4 has published scores: Redis lost its watermark",
        "D0 (partition 1): the hidden state differs; the state alone: no score shows since when",
        "and 11 more",
        "U (partition 2): began before the log does",
        "NOT what the log says",
    ]:
        assert words in text
    assert "D20 " not in text
    report = msgspec.json.decode(to_json(found, VerifyOptions(sample=5), "0f3a", 0.5))
    assert report["right"] is False
    assert report["options"]["sample"] == 5
    assert report["found"]["differences"][30]["offset"] == 123
