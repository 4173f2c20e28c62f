"""One run: a log, workers, the faults of a seed, and the check of the results.

Things fail in the first part of a run, and nothing fails in the second. Each run draws its own
faults, their frequency and their moments. It leaves some faults out, because a fault that always
occurs with all others hides its own effects. An event occurs at an effect instead of a time, so it
can fall between any two effects.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any
from unittest import mock

from faust.types import TP
from faust.utils import terminal

from pipeline.errors import RejectedError
from pipeline.kafka.producer import PublishError
from pipeline.kafka.topics import ROLES
from pipeline.messages.control import CONTROL_HEADER, FORGET, LOOK
from pipeline.messages.extra_fields import ExtraFields
from pipeline.messages.labels import decode_label
from pipeline.messages.replies import REPLY_HEADER, content_hash
from pipeline.messages.transactions import WARM_HEADER
from pipeline.scoring import decoder, outputs, recovery, topic_id_cache
from pipeline.scoring.labels import merchant_label_of
from pipeline.settings import Settings, load_settings
from pipeline.worker import faust_transport as poll_transport
from tests.fakes import memory
from tests.fakes.memory import MemoryKafka, MemoryMerchantStore, MemoryStateStore
from tests.fakes.memory_workers import DAY_MS, START_MS
from tests.simulation.auditor import Auditor, Entry, Violation
from tests.simulation.chain import (
    POISON,
    ChainScorer,
    NoReasons,
    chain_checkpoint,
    weight_of,
)
from tests.simulation.clock import Host, Loop
from tests.simulation.group import SESSION_SECONDS, Coordinator
from tests.simulation.network import Faults, Network, UnexpectedError
from tests.simulation.services import StateStore
from tests.simulation.worker import Parts, Services, Worker

HEAL_SECONDS = 300.0
"""Time after the last fault within which all work must be done."""

SETTLE_SECONDS = 25.0
"""Time after the last fault within which live workers get all partitions."""

ACCOUNTS = 3
"""Accounts in each partition of the transactions topic."""

MERCHANTS = 2
"""Merchants in each partition of the labels topic."""

IDLE_SECONDS = 0.5
"""Time without an effect after which the next scheduled event occurs at once."""

GC_THRESHOLD = 20_000
"""Allocations before a garbage collection. Python's default of 700 costs a tenth of a run."""

HOUR_MS = 3_600_000


@dataclass
class Result:
    """Result of a run.

    Attributes:
        violation: the first violation, if any.
        trace: the run's steps, if requested.
        effects: number of effects on services.
        events: names of the scheduled events that occurred.
    """

    seed: int
    violation: Violation | None
    trace: list[str]
    effects: int
    steps: int
    events: list[str]


_scorers: dict[tuple[type[ChainScorer], int], ChainScorer] = {}


def _scorer(kind: type[ChainScorer], ttl_ms: int) -> ChainScorer:
    """Return a shared scorer, which keeps nothing between micro-batches."""
    if (kind, ttl_ms) not in _scorers:
        _scorers[kind, ttl_ms] = kind(chain_checkpoint(), ttl_ms)
    return _scorers[kind, ttl_ms]


@cache
def _settings(micro_batch_max: int, state_cache_size: int, merchant_cache_size: int) -> Settings:
    return load_settings(
        topic_partitions=2,
        micro_batch_max=micro_batch_max,
        state_cache_size=state_cache_size,
        merchant_cache_size=merchant_cache_size,
        state_ttl_days=1.0,
        on_new_log="begin",
    )


_now: list[Loop] = []


@contextmanager
def simulating() -> Iterator[None]:
    """Patch the modules for runs: small limits and the loop's clock."""
    logging.disable()
    with ExitStack() as stack:
        for module, name, value in (
            (recovery, "RECOVERY_LOOKAHEAD", 3),
            (topic_id_cache, "MAX_AGE_SECONDS", 0.0),
            (memory, "FETCH_RECORDS", 2),
            (poll_transport, "monotonic", lambda: _now[-1].time()),
            (poll_transport, "FETCH_TIMEOUT_SECONDS", 20.0),
            (outputs, "Explainer", NoReasons),
            (terminal, "logtable", lambda *_, **__: ""),
            (decoder, "ExtraFields", cache(ExtraFields)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        gc.collect()
        gc.freeze()
        thresholds = gc.get_threshold()
        gc.set_threshold(GC_THRESHOLD)
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()
            logging.disable(logging.NOTSET)


def simulate(seed: int, parts: Parts | None = None, *, trace: bool = False) -> Result:
    """Run one seed; the caller is within :func:`simulating`."""
    run = Run(seed, parts or Parts(), trace=trace)
    _now.append(run.loop)
    try:
        return run.result()
    finally:
        _now.pop()


class Run:
    """One simulated run.

    Args:
        seed: decides everything in the run.
        parts: the classes that workers are built from.
        trace: whether to record each step.
    """

    def __init__(self, seed: int, parts: Parts, *, trace: bool) -> None:
        rng = self.rng = Random(seed)
        self.seed = seed
        self.loop = Loop(self._after_step)  # type: ignore[abstract]  # a run does not use the rest
        self.now_ms = START_MS
        self.settings = _settings(
            rng.choice([2, 3, 5, 8]), rng.choice([0, 0, 1000]), rng.choice([0, 2, 1000])
        )
        self._parts = parts
        self._lines: list[str] = []
        self._note: Callable[[str], None] | None = self._write if trace else None
        self._violation: Violation | None = None
        partitions = self.settings.topic_partitions
        self._topic = self.settings.topic("transactions")
        self._labels_topic = self.settings.topic("labels")
        self.kafka = MemoryKafka(
            {self.settings.topic(role): partitions for role in ROLES}, lambda: self.now_ms
        )
        self.store = StateStore()
        self.merchants = MemoryMerchantStore()
        scorer = _scorer(parts.scorer, int(self.settings.state_ttl_days * DAY_MS))
        self.auditor = Auditor(
            topic=self._topic,
            partitions=partitions,
            codec=scorer.codec,
            ttl_ms=int(self.settings.state_ttl_days * DAY_MS),
            store=self.store,
            merchants=self.merchants,
            found=self._found,
            log_id=self.kafka.topic_id(self._topic),
        )
        self.faults = self._draw_faults()
        self.network = Network(self.loop, rng, self.faults, self._before_effect, self._note)
        self.coordinator = Coordinator(
            self.loop,
            rng,
            self.network,
            [self._topic, self._labels_topic],
            partitions,
            self.auditor.committed,
        )
        self._services = Services(
            self.loop,
            rng,
            self.network,
            self.coordinator,
            self.settings,
            scorer,
            self.kafka,
            self.store,
            self.merchants,
            self.auditor,
            lambda: self.now_ms,
            is_cluster=rng.random() < 0.5,
        )
        self._snapshots = [(self.store.copy(), _copy(self.merchants))]
        self._workers: list[Worker] = []
        self._started = 0
        self._happened: list[str] = []
        self._schedule = self._draw_schedule()
        self._seen_effects = 0
        self._is_healing = False
        self._is_all_produced = False
        self._accounts = [self._names(p, "A", ACCOUNTS) for p in range(partitions)]
        self._merchant_names = [
            name for p in range(partitions) for name in self._names(p, "m", MERCHANTS)
        ]
        self._sent: list[dict[str, Any]] = []
        self._numbered = 0

    def _names(self, partition: int, letter: str, count: int) -> list[str]:
        return list(_names(letter, count, self.settings.topic_partitions)[partition])

    # draws -------------------------------------------------------------------------------

    def _draw_faults(self) -> Faults:
        """Draw the share of each kind of fault; in half of the cases it is zero."""
        rng = self.rng

        def share(most: float) -> float:
            return most * rng.random() ** 2 if rng.random() < 0.5 else 0.0

        return Faults(
            slow=share(0.3),
            held=share(0.3),
            lost=share(0.2),
            partial=share(0.2),
            unanswered=share(0.2),
            late=share(0.1),
            unexpected=share(0.02),
        )

    def _draw_schedule(self) -> list[tuple[int, Callable[[], None]]]:
        """Draw the events and the effect before which each one occurs."""
        rng = self.rng
        events: list[Callable[[], None]] = []
        for event, most in (
            (self._kill, 5),
            (self._start, 3),
            (self._stop_for_a_while, 3),
            (self._terminate, 2),
            (self._expel, 5),
            (self._rebalance, 3),
            (self._lose_data, 3),
            (self._look_at_labels, 3),
            (self._make_topic_again, 2),
        ):
            if rng.random() < 0.5:
                events += [event] * rng.randint(1, most)
        records = rng.randint(8, 18)
        span = 5 * records
        schedule = [(rng.randrange(span), event) for event in events]
        # Records arrive one by one, or in bursts that keep the workers busy.
        moments = [rng.randrange(span // 2) for _ in range(rng.choice([1, 2, 3, 100]))]
        if len(moments) > 3:
            moments = list(range(span))
        schedule += [(rng.choice(moments), self._produce) for _ in range(records)]
        schedule += [(rng.randrange(span), self._label) for _ in range(records // 2)]
        schedule.sort(key=lambda item: item[0])
        return schedule

    # events ------------------------------------------------------------------------------

    def _produce(self) -> None:
        """Produce a record of the transactions topic."""
        rng = self.rng
        self.now_ms += int(rng.random() ** 2 * 6 * HOUR_MS)
        partition = rng.randrange(self.settings.topic_partitions)
        self._append(partition, rng.choice(self._accounts[partition]), rng.random())

    def _append(self, partition: int, account: str, chance: float) -> None:
        rng, number = self.rng, self._numbered
        self._numbered += 1
        fields: dict[str, Any] = {
            "transaction_id": f"t{number}",
            "account_id": account,
            "merchant_id": rng.choice(self._merchant_names),
            "amount": round(rng.random() * 100, 2),
            "currency": "EUR",
            "timestamp": self.now_ms,
        }
        headers: list[tuple[str, bytes]] = []
        rejected = instruction = None
        if chance < 0.05 and self._sent:
            before = rng.choice(self._sent[-8:])  # a producer sends it twice
            partition, fields = before["partition"], before["fields"]
        elif chance < 0.08:
            fields["amount"], rejected = POISON, "computation"
        elif chance < 0.12:
            headers.append((WARM_HEADER, b"1"))
        elif chance < 0.14:
            headers.append((CONTROL_HEADER, b"what nobody knows"))
            rejected = "control"
        elif 0.18 <= chance < 0.26:
            instruction = FORGET if chance < 0.24 else LOOK
            headers.append((CONTROL_HEADER, instruction))
        elif 0.26 <= chance < 0.30:  # a conflict of ids
            ids = [b["fields"] for b in self._sent if b["fields"]["account_id"] == account]
            if ids:
                fields["transaction_id"] = ids[-1]["transaction_id"]
        value = b"" if instruction else json.dumps(fields).encode()
        if 0.14 <= chance < 0.18:
            value, rejected = value[:-1], "not_json"
        headers += _reply_to(number)
        key = str(fields["account_id"]).encode()
        entry = Entry(
            account=fields["account_id"],
            merchant=fields["merchant_id"],
            amount=fields["amount"],
            transaction_id=fields["transaction_id"],
            content=f"{fields['merchant_id']} {fields['amount']} {fields['timestamp']}",
            rejected=rejected,
            instruction=instruction,
            asked=_asked(number, value),
            is_warm=(WARM_HEADER, b"1") in headers,
        )
        self.kafka.produce(self._topic, key, value, partition=partition, headers=headers)
        entry = self.auditor.partitions[partition].produced(entry, self.now_ms)
        if rejected is None and instruction is None:
            weights = self.auditor.labels.weights.setdefault(entry.place, set())
            weights.add(weight_of(entry.amount))
            self._sent.append({"partition": partition, "fields": fields})
        self._tell(f"a record of {fields['account_id']} in {partition}: {entry}")
        self._wake()

    def _label(self) -> None:
        """Produce a label of an earlier transaction."""
        rng = self.rng
        if not self._sent:
            return
        self.now_ms += int(rng.random() * HOUR_MS)
        fields = rng.choice(self._sent)["fields"]
        text: dict[str, Any] = {"label": rng.choice(["fraud", "fraud", "legitimate"])}
        text["labelled_at"] = self.now_ms
        if rng.random() < 0.4:  # the label is late
            known_ms = self.now_ms - int(rng.random() * 12 * HOUR_MS)
            text["labelled_at"] = max(fields["timestamp"], known_ms)
        if rng.random() < 0.2:
            text["merchant_weight"] = round(rng.random(), 3)
        self._append_label(fields, text, rng.random() < 0.1)

    def _append_label(self, fields: dict[str, Any], more: dict[str, Any], is_bad: bool) -> None:
        names = ("transaction_id", "account_id", "merchant_id", "timestamp")
        text = {name: fields[name] for name in names} | more
        value = json.dumps(text).encode()
        if is_bad:
            value = value[:-1]
        key = str(fields["merchant_id"]).encode()
        partition = self.kafka.partition_of(self._labels_topic, key)
        offset = self.kafka.produce(self._labels_topic, key, value, partition=partition)
        try:
            booking = merchant_label_of(offset, *decode_label(key, value))
        except RejectedError:
            pass
        else:
            self.auditor.labels.bookings[partition][offset] = booking
        self.auditor.labels.ends[partition] = offset + 1
        self._tell(f"a label of {fields['merchant_id']} in {partition}: {more}")
        self._wake()

    def _wake(self) -> None:
        for worker in self._workers:
            worker.member.thread.wake()

    def _start(self) -> None:
        """Start a worker."""
        self._started += 1
        host = Host(f"worker {self._started}")
        worker = (self._parts.worker or Worker)(host, self._services, self._parts, self._died)
        self._workers.append(worker)
        self._tell(f"{host.name} starts")
        worker.start()

    def _some_worker(self) -> Worker | None:
        return self.rng.choice(self._workers) if self._workers else None

    def _kill(self) -> None:
        """Kill a worker as with SIGKILL; the group notices at the session timeout."""
        worker = self._some_worker()
        if worker is not None:
            self._tell(f"{worker.host.name} is killed")
            self._bury(worker)

    def _died(self, worker: Worker) -> None:
        """Handle a worker that ended by itself."""
        error = worker.error
        self._tell(f"{worker.host.name} ends: {error!r}")
        if error is not None and not isinstance(error, (UnexpectedError, PublishError)):
            self._found(Violation("crash", f"{type(error).__name__}: {error}"))
        if worker in self._workers:
            self._bury(worker)

    def _bury(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
        self.loop.later(SESSION_SECONDS, self.coordinator.expel, worker.member)
        self.loop.later(self.rng.uniform(0, 12), self._replace)

    def _replace(self) -> None:
        if len(self._workers) < 2:
            self._start()

    def _stop_for_a_while(self) -> None:
        """Stop a worker as with SIGSTOP and continue it later; its session may time out."""
        worker = self._some_worker()
        if worker is None:
            return
        seconds = self.rng.uniform(0, 3 * SESSION_SECONDS)
        self._tell(f"{worker.host.name} is stopped for {seconds:.1f} s")
        worker.host.stopped_until = self.loop.time() + seconds
        if seconds > SESSION_SECONDS:
            self.loop.later(SESSION_SECONDS, self.coordinator.expel, worker.member)

    def _terminate(self) -> None:
        """End a worker as with SIGTERM."""
        worker = self._some_worker()
        if worker is not None:
            self._tell(f"{worker.host.name} is asked to end")
            worker.stop()

    def _expel(self) -> None:
        """Exclude a worker that still runs."""
        worker = self._some_worker()
        if worker is not None:
            self._tell(f"{worker.host.name} is left out of the group")
            worker.host.held = self.rng.random()
            self.coordinator.expel(worker.member)

    def _rebalance(self) -> None:
        self._tell("the group rebalances")
        self.coordinator.rebalance()

    def _look_at_labels(self) -> None:
        worker = self._some_worker()
        if worker is not None:
            self._tell(f"{worker.host.name} looks whether its labels are still recorded")
            worker.look_at_labels()

    def _make_topic_again(self) -> None:
        """Delete the transactions topic and its committed offsets, and make it again."""
        self._tell("the transactions topic is made again")
        self.kafka.recreate(self._topic)
        for partition in range(self.settings.topic_partitions):
            self.coordinator.committed.pop(TP(self._topic, partition), None)
        self._sent.clear()
        self.auditor.made_again(self.kafka.topic_id(self._topic))

    def _lose_data(self) -> None:
        """Set the store back to an earlier moment, or empty it."""
        if self.rng.random() < 0.3:
            store, merchants = MemoryStateStore(), MemoryMerchantStore()
        else:
            store, merchants = self.rng.choice(self._snapshots)
        self._tell("the store loses data")
        self.store.restore(store)
        _restore(self.merchants, merchants)
        self.auditor.lost_data()

    # running -----------------------------------------------------------------------------

    def result(self) -> Result:
        """Run the simulation and return its result."""
        try:
            self._run()
        finally:
            for worker in self._workers:
                worker.kill()
            self.loop.close()
        return Result(
            self.seed,
            self._violation,
            self._lines,
            self.network.effects,
            self.loop.steps,
            self._happened,
        )

    def _run(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self._start()
        self.loop.later(IDLE_SECONDS, self._look)
        self.loop.run(until=10_000.0)
        if self._violation is None and not self._is_done():
            raise RuntimeError(f"seed {self.seed}: the run stands still")
        if self._violation is None:
            self.auditor.finish()

    def _before_effect(self) -> None:
        while self._schedule and self._schedule[0][0] <= self.network.effects:
            _, event = self._schedule.pop(0)
            self._happened.append(event.__name__[1:])
            self.loop.soon(event)
        if self.rng.random() < 0.2:
            self._snapshots.append((self.store.copy(), _copy(self.merchants)))

    def _look(self) -> None:
        """Trigger the next event if the run is idle; heal or end the run when it is due."""
        if self.network.effects == self._seen_effects and self._schedule:
            _, event = self._schedule.pop(0)
            self._happened.append(event.__name__[1:])
            event()
        self._seen_effects = self.network.effects
        if not self._schedule and not self._is_healing:
            self._heal()
        if self._is_all_produced and self._is_done():
            self.loop.is_over = True
        self.loop.later(IDLE_SECONDS, self._look)

    def _heal(self) -> None:
        """Stop all faults and make the group rebalance, so that all work can complete."""
        self._tell("everything works from now on")
        self._is_healing = True
        self.faults.end()
        for worker in self._workers:
            worker.host.stopped_until = worker.host.held = 0.0
        self.coordinator.rebalance()
        self._replace()
        self.loop.later(SETTLE_SECONDS, self._produce_last)
        self.loop.later(HEAL_SECONDS, self._give_up)

    def _produce_last(self) -> None:
        """Produce a record and a label in each partition, so that workers check its states."""
        for partition, accounts in enumerate(self._accounts):
            self._append(partition, accounts[0], 1.0)
        for merchant in self._merchant_names[::MERCHANTS]:
            fields = {**self._sent[-1]["fields"], "merchant_id": merchant}
            more = {"label": "fraud", "labelled_at": self.now_ms}
            self._append_label(fields, more, False)
        self._is_all_produced = True

    def _give_up(self) -> None:
        if not self._is_done():
            self._found(Violation("lost", f"not all is done after {HEAL_SECONDS:.0f} s"))

    def _is_done(self) -> bool:
        """Return whether everything is applied, recorded and committed."""
        committed = self.coordinator.committed
        for partition, audit in enumerate(self.auditor.partitions):
            if committed.get(TP(self._topic, partition), 0) < len(audit.entries):
                return False
            if audit.watermark < len(audit.entries):
                return False
            if not self.auditor.labels_are_recorded(partition):
                return False
        return True

    def _after_step(self) -> None:
        if self.store.changed:
            for partition in sorted(self.store.changed):
                self.auditor.states_changed(partition)
            self.store.changed.clear()

    def _found(self, violation: Violation) -> None:
        if self._violation is None:
            self._violation = violation
            self._tell(f"WRONG: {violation}")
        self.loop.is_over = True

    def _tell(self, text: str) -> None:
        if self._note is not None:
            self._note(text)

    def _write(self, text: str) -> None:
        self._lines.append(f"{self.loop.time():9.3f}  {self.network.effects:4}  {text}")


def _reply_to(number: int) -> list[tuple[str, bytes]]:
    """Return the header of a record that asks for an answer, as two in three do."""
    return [(REPLY_HEADER, b"gateway-%d" % (number % 2))] if number % 3 else []


def _asked(number: int, value: bytes) -> bytes | None:
    """Return the content hash of a record that asks for an answer."""
    return content_hash(value) if number % 3 else None


@cache
def _names(letter: str, count: int, partitions: int) -> list[list[str]]:
    """Return names for each partition whose key the broker maps to it."""
    kafka = MemoryKafka({"any": partitions}, lambda: 0)
    found: list[list[str]] = [[] for _ in range(partitions)]
    number = 0
    while any(len(names) < count for names in found):
        name = f"{letter}{number}"
        number += 1
        names = found[kafka.partition_of("any", name.encode())]
        if len(names) < count:
            names.append(name)
    return found


def _copy(store: MemoryMerchantStore) -> MemoryMerchantStore:
    other = MemoryMerchantStore()
    _restore(other, store)
    return other


def _restore(store: MemoryMerchantStore, other: MemoryMerchantStore) -> None:
    store.profiles = dict(other.profiles)
    store.notes = dict(other.notes)
    store.recorded = dict(other.recorded)
