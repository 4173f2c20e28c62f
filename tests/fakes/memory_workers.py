"""Workers on Kafka and stores in memory: run step by step, killed, restarted, and checked.

A worker's coroutine waits only where a fake lets others run. So a test can step several workers
in any order, without an event loop or a clock.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from model.architecture import Architecture
from model.checkpoint import Checkpoint, CheckpointThresholds, Header
from model.features.account import AccountHistory, observe
from model.features.spec import ACCOUNT_INPUTS, FEATURES, INPUTS, FeatureSpec, Input
from model.network import Network
from model.stepper import sigmoid
from model.transaction import Transaction, epoch_ms
from pipeline.admin.rebuild_states import Rebuild
from pipeline.errors import RejectedError
from pipeline.kafka.polls import Poll
from pipeline.kafka.producer import Publisher
from pipeline.kafka.topics import ROLES
from pipeline.messages.control import CONTROL_HEADER, FORGET
from pipeline.messages.scores import decode_alert, decode_score
from pipeline.messages.transactions import WARM_HEADER, decode_transaction
from pipeline.scoring.assembly import WorkerServices, assemble
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.scorer import Scorer, scorer_of
from pipeline.scoring.stages import ComputedPoll
from pipeline.settings import Settings
from pipeline.storage.account_state import RECENT_IDS
from pipeline.storage.state_store import Save
from pipeline.storage.watermark import Watermark
from pipeline.tracing.polls import PollTracer
from tests.fakes.memory import (
    MemoryConsumer,
    MemoryKafka,
    MemoryMerchantStore,
    MemoryPollStore,
    MemoryProducer,
    MemoryRecord,
    MemoryScoreLog,
    MemoryStateStore,
    MemoryTransactions,
)

DAY_MS = 86_400_000
START_MS = 1_700_000_000_000
TOLERANCE_MS = 300_000
"""Default of the setting: how far an event time may be ahead of its record's time."""

HIDDEN_TOLERANCE = 4e-3
"""Hidden states that differ by at most this count as equal.

The last bits of a matrix product depend on its size, and float16 then rounds differently at each
step."""

SCORE_TOLERANCE = 2e-2
"""Scores that differ by at most this count as equal; the network of these tests is steep."""


def small_checkpoint(
    layers: int = 1,
    hidden_size: int = 8,
    seed: int = 7,
    inputs: tuple[Input, ...] = ACCOUNT_INPUTS,
) -> Checkpoint:
    """Make an untrained network with scores over [0, 1]; by default it uses no merchants."""
    architecture = Architecture(
        inputs=len(inputs),
        input_size=8,
        hidden_size=hidden_size,
        layers=layers,
        head_size=8,
        dropout=0.0,
        roles=FeatureSpec(inputs).roles,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(architecture)
    with torch.no_grad():
        network.logit.weight *= 12
        network.own.rest.fill_(2.0)  # the full merchant weight for every fraud
    header = Header(
        architecture=architecture,
        features=FeatureSpec(inputs),
        thresholds=CheckpointThresholds(review=0.3, decline=0.6),
    )
    return Checkpoint.of(network, header)


def checkpoint_of_weights() -> Checkpoint:
    """Make a checkpoint that gives payments far over the usual amount a low merchant weight.

    Amounts over 300 are out of its range.
    """
    checkpoint = small_checkpoint(inputs=INPUTS)
    own = checkpoint.network.own
    columns = [i for i in INPUTS if i.role in ("own", "amount")]
    with torch.no_grad():
        own.rest.fill_(-6.0)
        for layer in (own.hidden, own.explained):
            layer.weight.zero_()
            layer.bias.zero_()
        own.hidden.weight[0, columns.index(Input("amount_to_usual", "linear"))] = 1.0
        own.explained.weight[0, 0] = 1.0
        own.explained.bias[0] = -12.0
    ranges = [(-1e30, 1e30)] * len(FEATURES)
    ranges[FEATURES.index("amount")] = (0.0, 300.0)
    features = msgspec.structs.replace(checkpoint.header.features, ranges=tuple(ranges))
    header = msgspec.structs.replace(checkpoint.header, features=features)
    return Checkpoint.of(checkpoint.network, header)


class Killed(BaseException):
    """The worker dies here, as after SIGKILL: no code may handle this."""


@dataclass
class AccountReference:
    """One account's state, computed transaction by transaction without the worker's code."""

    history: AccountHistory
    hidden: NDArray[np.floating]  # [1, L, H]
    sent: list[Transaction] = field(default_factory=list)
    first_offset: int = -1
    last_offset: int = -1
    last_record_ms: int = 0


@dataclass
class PartitionReference:
    """The expected results of a partition's log."""

    scores: dict[int, float] = field(default_factory=dict)
    warm: set[int] = field(default_factory=set)
    rejected: dict[int, str] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    conflicting: set[int] = field(default_factory=set)
    accounts: dict[str, AccountReference] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)


def reference(
    checkpoint: Checkpoint,
    records: Sequence[MemoryRecord],
    ttl_ms: int = 30 * DAY_MS,
    *,
    reject_conflicts: bool = False,
) -> PartitionReference:
    """Compute a partition's log offline."""
    result = PartitionReference()
    for record in records:
        if (CONTROL_HEADER, FORGET) in record.headers and not record.value:
            result.accounts.pop((record.key or b"").decode(), None)
            result.forgotten.add(record.offset)
            continue
        try:
            transaction = _decoded(checkpoint, record)
        except RejectedError as error:
            result.rejected[record.offset] = error.reason
            continue
        state = result.accounts.get(transaction.account_id)
        last = [] if state is None else state.sent[-RECENT_IDS:]
        same_id = [other for other in last if other.transaction_id == transaction.transaction_id]
        if same_id and not any(_is_repeat(transaction, other) for other in same_id):
            result.conflicting.add(record.offset)
            if reject_conflicts:
                result.rejected[record.offset] = "id_conflict"
                continue
        score = _apply(checkpoint, result.accounts, transaction, record, ttl_ms)
        if score is None:
            result.repeated.add(record.offset)
            continue
        result.scores[record.offset] = score
        if any(name == WARM_HEADER for name, _ in record.headers):
            result.warm.add(record.offset)
    return result


def _decoded(checkpoint: Checkpoint, record: MemoryRecord) -> Transaction:
    if any(name == CONTROL_HEADER for name, _ in record.headers):
        raise RejectedError("control", "")
    transaction = decode_transaction(record.key, record.value, checkpoint.header.currency)
    if epoch_ms(transaction.timestamp) > _record_ms(transaction, record) + DAY_MS:
        raise RejectedError("future_timestamp", "")
    return transaction


def _record_ms(transaction: Transaction, record: MemoryRecord) -> int:
    """Return the record's time, or the event time if the record has no valid one."""
    is_time = 1973 <= 1970 + record.timestamp / (365.25 * DAY_MS) < 5000
    return record.timestamp if is_time else epoch_ms(transaction.timestamp)


def _is_repeat(transaction: Transaction, other: Transaction) -> bool:
    """Return whether this is a duplicate of an earlier payment."""
    names = ("transaction_id", "merchant_id", "amount", "timestamp")
    return all(getattr(transaction, name) == getattr(other, name) for name in names)


def _apply(
    checkpoint: Checkpoint,
    accounts: dict[str, AccountReference],
    transaction: Transaction,
    record: MemoryRecord,
    ttl_ms: int,
) -> float | None:
    """Return the score; None for a duplicate."""
    state = accounts.get(transaction.account_id)
    if state is not None and any(_is_repeat(transaction, o) for o in state.sent[-RECENT_IDS:]):
        return None
    sent_ms = epoch_ms(transaction.timestamp)
    record_ms = _record_ms(transaction, record)
    if state is None or record_ms - state.last_record_ms > ttl_ms:
        state = AccountReference(AccountHistory.empty(1), checkpoint.stepper.empty_hidden(1))
        state.first_offset = record.offset
        accounts[transaction.account_id] = state
    raw, state.history = observe(
        state.history,
        np.array([transaction.amount]),
        np.array([min(sent_ms, record_ms + TOLERANCE_MS)]),
        checkpoint.header.features.scale,
    )
    others = np.zeros((1, len(FEATURES) - raw.shape[1]), np.float32)
    inputs = checkpoint.encode(np.hstack((raw, others)))
    logits, hidden = checkpoint.stepper.step(inputs, state.hidden)
    state.hidden = hidden.astype(np.float16)
    state.sent.append(transaction)
    state.last_offset = record.offset
    state.last_record_ms = max(state.last_record_ms, record_ms)
    return float(sigmoid(logits)[0])


class AuditedStateStore(MemoryStateStore):
    """A store that tracks the highest saved watermark of each partition."""

    def __init__(self) -> None:
        super().__init__()
        self.furthest: Counter[int] = Counter()

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        stands = await super().save(requests)
        for request, stood in zip(requests, stands, strict=True):
            if stood:
                offset = Watermark.from_bytes(request.watermark).next_offset
                self.furthest[request.partition] = max(self.furthest[request.partition], offset)
        return stands


_references: dict[tuple[str, int, bool, str], PartitionReference] = {}
"""Cache of references: tests that kill a worker at every step need the same ones repeatedly."""


class World:
    """A broker, stores and any number of workers, one after another or side by side."""

    def __init__(self, checkpoint: Checkpoint | None = None, **settings: Any) -> None:
        self.checkpoint = checkpoint or small_checkpoint()
        self.settings = Settings(**{"topic_partitions": 2, "micro_batch_max": 8, **settings})
        self.now_ms = START_MS
        self.kafka = MemoryKafka(
            {self.settings.topic(role): self.settings.topic_partitions for role in ROLES},
            clock_ms=lambda: self.now_ms,
        )
        self.store = AuditedStateStore()
        self.merchants = MemoryMerchantStore()
        self.topic = self.settings.topic("transactions")
        self.partitions = range(self.settings.topic_partitions)
        self.tracer: PollTracer | None = None

    # input -------------------------------------------------------------------------------

    def produce(
        self, account: str, transaction_id: str | None = None, **changes: Any
    ) -> tuple[int, int]:
        """Append a transaction, a minute after the last one; return its partition and offset.

        Args:
            changes: other fields, ``headers``, and ``record_ms``, the record's CreateTime.
        """
        self.now_ms += 60_000
        headers, record_ms = changes.pop("headers", ()), changes.pop("record_ms", None)
        fields = {
            "transaction_id": transaction_id or f"t{self.now_ms}",
            "account_id": account,
            "merchant_id": "m1",
            "amount": 20.0,
            "currency": "EUR",
            "timestamp": self.now_ms,
        } | changes
        return self.produce_raw(account.encode(), json.dumps(fields).encode(), headers, record_ms)

    def produce_raw(
        self,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
        record_ms: int | None = None,
    ) -> tuple[int, int]:
        """Append a record; return its partition and offset."""
        partition = self.kafka.partition_of(self.topic, key)
        return partition, self.kafka.produce(
            self.topic, key, value, headers=headers, timestamp_ms=record_ms
        )

    def forget(self, account: str) -> tuple[int, int]:
        """Append a control record to forget an account; return its partition and offset."""
        return self.produce_raw(account.encode(), None, [(CONTROL_HEADER, FORGET)])

    def produce_many(self, count: int, accounts: int = 6, seed: int = 0) -> None:
        """Append transactions of a few accounts.

        Duplicates, invalid records, warm-up records and forget requests are mixed in.
        """
        rng = np.random.default_rng(seed)
        for i in range(count):
            account = f"A{rng.integers(accounts)}"
            amount = round(float(rng.gamma(2.0, 60.0)), 2)
            if i % 11 == 7:
                self.produce_raw(account.encode(), b"not a transaction")
            elif i % 13 == 10:
                self.forget(account)
            elif i % 9 == 8:
                timestamp = self.now_ms
                for _ in range(1 + i % 2):
                    self.produce(account, f"t{i}-{account}", amount=amount, timestamp=timestamp)
            else:
                headers = [(WARM_HEADER, b"1")] if i % 7 == 3 else []
                self.produce(account, amount=amount, headers=headers)

    def account_in(self, partition: int, number: int = 0) -> str:
        """Return the name of an account that lies in a partition."""
        names = (f"P{partition}-{number}-{i}" for i in range(1000))
        topic, kafka = self.topic, self.kafka
        return next(name for name in names if kafka.partition_of(topic, name.encode()) == partition)

    # workers -----------------------------------------------------------------------------

    def worker(
        self,
        assigned: Collection[int] | None = None,
        checkpoint: Checkpoint | None = None,
        publisher: Publisher | None = None,
    ) -> MemoryWorker:
        """Start a new worker with these partitions, or all."""
        assigned = self.partitions if assigned is None else assigned
        return MemoryWorker(self, assigned, checkpoint or self.checkpoint, publisher)

    def rebuild(self) -> Rebuild:
        """Return the rebuild of states, over this store and log."""
        return Rebuild(
            self.topic,
            self.settings.topic("scores"),
            self.settings.topic_partitions,
            self.store,
            MemoryScoreLog(self.kafka, self.settings),
            {p: self.committed(p) or 0 for p in self.partitions},
        )

    def committed(self, partition: int) -> int | None:
        """Return the group's committed offset, or None."""
        return self.kafka.committed(self.settings.kafka_group_id, self.topic, partition)

    def interrupt(self, interrupt: Callable[[str], None]) -> None:
        """Call an interrupt before and after every effect on broker and stores."""
        self.kafka.interrupt = self.store.interrupt = self.merchants.interrupt = interrupt

    # output ------------------------------------------------------------------------------

    def watermark(self, partition: int) -> int:
        """Return the first offset that is not applied; 0 without a watermark."""
        value = self.store.watermarks.get(partition)
        return 0 if value is None else Watermark.from_bytes(value).next_offset

    def scores(self, partition: int) -> dict[int, list[bytes]]:
        """Return the published scores by source offset, in the order of publishing."""
        found: dict[int, list[bytes]] = {}
        for record in self.kafka.records(self.settings.topic("scores"), partition):
            assert record.value is not None
            score = decode_score(record.value)
            topic, number, offset = score.source.rsplit(":", 2)
            assert (topic, int(number)) == (self.topic, partition)
            assert record.key == score.account_id.encode()
            found.setdefault(int(offset), []).append(record.value)
        return found

    def alerts(self) -> Counter[str]:
        """Count the alerts by source."""
        return Counter(
            decode_alert(record.value or b"").source
            for record in self.kafka.records(self.settings.topic("alerts"))
        )

    def dead_letters(self) -> Counter[tuple[int, int, str]]:
        """Count the dead letters by partition, offset and reason."""
        found: Counter[tuple[int, int, str]] = Counter()
        for record in self.kafka.records(self.settings.topic("dead_letter")):
            headers = dict(record.headers)
            place = int(headers["partition"]), int(headers["offset"])
            found[*place, headers["reason"].decode()] += 1
        return found

    # checks ------------------------------------------------------------------------------

    def assert_published_before_saved(self) -> None:
        """Check that everything before a watermark is in the output topics."""
        for partition in self.partitions:
            next_offset = self.watermark(partition)
            expected = self.references()[partition]
            scores, alerts = self.scores(partition), self.alerts()
            dead = {(p, offset) for p, offset, _ in self.dead_letters()}
            for offset in range(next_offset):
                if offset in expected.scores:
                    assert offset in scores, "saved before its score was published"
                    self._assert_alert(partition, offset, scores[offset][0], expected, alerts)
                if offset in expected.rejected:
                    assert (partition, offset) in dead, "saved before it was in dead-letter"

    def references(self) -> list[PartitionReference]:
        """Compute every partition offline, from its whole log."""
        ttl_ms = int(self.settings.state_ttl_days * DAY_MS)
        reject = self.settings.id_conflicts == "reject"
        found = []
        for partition in self.partitions:
            records = self.kafka.records(self.topic, partition)
            key = self.checkpoint.digest, ttl_ms, reject, str(records)
            if key not in _references:
                _references[key] = reference(
                    self.checkpoint, records, ttl_ms, reject_conflicts=reject
                )
            found.append(_references[key])
        return found

    def assert_all_applied(self, *, scores_once: bool = True, alerts_once: bool = False) -> None:
        """Check that every transaction is scored and applied once, with no other output."""
        alerts, dead = self.alerts(), self.dead_letters()
        for partition, expected in zip(self.partitions, self.references(), strict=True):
            log_end = self.kafka.bounds(self.topic, partition).end
            assert self.watermark(partition) == log_end
            scores = self.scores(partition)
            assert scores.keys() == expected.scores.keys()
            for offset, published in scores.items():
                if scores_once:
                    assert len(published) == 1, f"{len(published)} scores of {offset}"
                self._assert_scores(offset, published, expected)
                self._assert_alert(partition, offset, published[0], expected, alerts)
            for offset, reason in expected.rejected.items():
                assert dead.pop((partition, offset, reason)) >= 1
            assert_states(self, partition, expected)
        assert not dead, "records in dead-letter that were not rejected"
        if alerts_once:
            assert set(alerts.values()) <= {1}

    def _assert_scores(
        self, offset: int, published: Sequence[bytes], expected: PartitionReference
    ) -> None:
        first, *others = [decode_score(value) for value in published]
        assert abs(first.score - expected.scores[offset]) < SCORE_TOLERANCE
        assert first.model == self.checkpoint.digest
        for other in others:
            assert other.transaction_id == first.transaction_id
            assert abs(other.score - first.score) < SCORE_TOLERANCE

    def _assert_alert(
        self,
        partition: int,
        offset: int,
        value: bytes,
        expected: PartitionReference,
        alerts: Counter[str],
    ) -> None:
        score = decode_score(value)
        thresholds = self.checkpoint.header.thresholds
        decisions = ["approve", "review", "decline"]
        at = (score.score >= thresholds.review) + (score.score >= thresholds.decline)
        assert score.decision == decisions[at]
        wanted = at > 0 and offset not in expected.warm
        source = f"{self.topic}:{partition}:{offset}"
        assert (alerts[source] > 0) == wanted, f"alert of {source} at score {score.score}"


def assert_states(world: World, partition: int, expected: PartitionReference) -> None:
    """Check that the states of a partition equal the offline computation."""
    codec = Scorer(world.checkpoint, ttl_ms=1).codec
    stored = {account for p, account in world.store.states if p == partition}
    assert stored == expected.accounts.keys()
    for account, state in expected.accounts.items():
        found, loaded, _ = codec.decode([world.store.states[partition, account]])
        assert loaded.all(), account
        assert int(found.first_offset[0]) == state.first_offset, account
        assert int(found.last_offset[0]) == state.last_offset, account
        assert int(found.last_record_ms[0]) == state.last_record_ms, account
        history = found.history
        assert int(history.count[0]) == int(state.history.count[0]), account
        assert int(history.last_event_ms[0]) == int(state.history.last_event_ms[0]), account
        np.testing.assert_allclose(history.decayed_count, state.history.decayed_count, 1e-5)
        np.testing.assert_allclose(history.decayed_amount, state.history.decayed_amount, 1e-5)
        last = state.sent[-RECENT_IDS:]
        ids = {xxhash.xxh3_64_intdigest(t.transaction_id.encode()) >> 32 for t in last}
        remembered = set(found.recent_ids[0].tolist()) - {0}
        assert {entry >> 32 for entry in remembered} == ids, account
        contents = {(t.transaction_id, t.merchant_id, t.amount, t.timestamp) for t in last}
        assert len(remembered) == len(contents), account
        difference = found.hidden[0].astype(np.float32) - state.hidden[0]
        assert np.abs(difference).max() < HIDDEN_TOLERANCE, account


Choose = Callable[[Sequence[int]], int]
"""A choice of the next coroutine among these."""


def in_turn(candidates: Sequence[int]) -> int:
    """Choose the first; :func:`side_by_side` lists the last runner at the end."""
    return candidates[0]


async def side_by_side(*coroutines: Coroutine[Any, Any, Any], choose: Choose) -> list[Any]:
    """Run coroutines step by step in the order of ``choose``; return their results."""
    results: list[Any] = [None] * len(coroutines)
    alive = list(range(len(coroutines)))
    try:
        while alive:
            number = choose(alive)
            alive.remove(number)
            try:
                coroutines[number].send(None)
            except StopIteration as end:
                results[number] = end.value
            else:
                alive.append(number)
                await asyncio.sleep(0)
    finally:
        for coroutine in coroutines:
            coroutine.close()
    return results


class MemoryWorker:
    """A worker: the real processor on fakes."""

    def __init__(
        self,
        world: World,
        assigned: Collection[int],
        checkpoint: Checkpoint,
        publisher: Publisher | None = None,
    ) -> None:
        self.world = world
        settings = world.settings
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(10.0, clock=lambda: 0.0)
        self.consumer = MemoryConsumer(world.kafka, settings, assigned)
        self.fenced: list[int] = []
        self.scorer = scorer_of(settings, checkpoint)
        self.polls = MemoryPollStore(world.store, world.merchants)
        services = WorkerServices(
            store=world.store,
            merchants=world.merchants,
            polls=self.polls,
            publisher=publisher or MemoryProducer(world.kafka, settings),
            score_log=MemoryScoreLog(world.kafka, settings),
            consumer=self.consumer,
            labels_consumer=MemoryConsumer(world.kafka, settings, (), "labels"),
            metrics=self.metrics,
            health=self.health,
            transactions=(
                MemoryTransactions(world.kafka, settings) if settings.exactly_once else None
            ),
            on_fenced=self.fenced.append,
            clock_ms=lambda: world.now_ms,
            tracer=world.tracer,
        )
        parts = assemble(settings, self.scorer, settings.topic_partitions, services)
        self.ownership, self.processor = parts.ownership, parts.processor
        self.ownership.assign(assigned)
        self.acked: list[dict[int, int]] = []
        self._generation = 0

    def rebalance(self, partitions: Collection[int]) -> None:
        """Assign exactly these partitions; polls in flight are dropped."""
        self.ownership.revoke(self.ownership.assigned())
        self.ownership.assign(partitions)
        self.consumer.assign(partitions)
        self._generation += 1

    async def process(self, poll: Poll) -> Poll:
        """Process one poll, acknowledged as the transport does."""
        generation = self._generation
        await self._conclude(await self.processor.compute(poll), generation)
        return poll

    async def _conclude(self, computed: ComputedPoll, generation: int) -> None:
        """Publish, save and ack; polls from before a rebalance are not acked."""
        await self.processor.conclude(computed)
        if generation == self._generation:
            self._assert_saved(computed.poll)
            self.acked.append(dict(computed.poll.applied))
            self.consumer.commit(computed.poll)

    def _assert_saved(self, poll: Poll) -> None:
        for partition, offset in poll.applied.items():
            assert offset <= self.world.store.furthest[partition], "acked what was never saved"

    async def run(
        self,
        polls_waiting: int = 1,
        records_max: int | None = None,
        choose: Choose = in_turn,
    ) -> None:
        """Process the log to its end: compute each poll while the one before is concluded.

        Args:
            polls_waiting: number of fetched polls behind the computed one.
            records_max: maximum number of records in a poll; by default the setting.
            choose: chooses which of the two continues.
        """
        waiting: deque[tuple[int, Poll]] = deque()
        concluding: Coroutine[Any, Any, None] | None = None
        try:
            while True:
                while len(waiting) <= polls_waiting and (poll := self.consumer.poll(records_max)):
                    waiting.append((self._generation, poll))
                if not waiting:
                    if concluding is None:
                        return
                    await concluding
                    concluding = None
                    continue
                generation, poll = waiting.popleft()
                if generation != self._generation:
                    continue
                computing = self.processor.compute(poll)
                if concluding is None:
                    computed = await computing
                else:
                    computed, _ = await side_by_side(computing, concluding, choose=choose)
                concluding = self._conclude(computed, generation)
        finally:
            if concluding is not None:
                concluding.close()

    def count(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 for labels without a value yet."""
        families = {family.name for family in self.metrics.registry.collect()}
        assert any(name.startswith(family) for family in families), f"no metric {name}"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def step(coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Run a coroutine to its next wait; return False once it has ended."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    return True


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine step by step to its end; return its result."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
