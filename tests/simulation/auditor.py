"""Auditor of a run: it knows the log and checks the results after each step.

It checks only what is visible from outside: the topics, the store and the committed offsets. It
knows two things about the workers. One is which worker the group made owner of a partition. The
other is from when a worker must have known a score (:class:`Conclusion`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from model.features.merchant import WEIGHT_MAX
from pipeline.kafka.score_log import LoggedScore, read_score
from pipeline.messages.control import FORGET
from pipeline.messages.decision import DECISIONS
from pipeline.messages.replies import Reply, StoredAnswer
from pipeline.messages.scores import decode_alert, decode_published
from pipeline.storage.account_state import RECENT_IDS, StateCodec
from pipeline.storage.keys import MERCHANT_SLOTS, merchant_slot
from pipeline.storage.merchant_profile import Fraud, Profile, transaction_hash
from pipeline.storage.merchant_store import MerchantLabel
from pipeline.storage.watermark import Watermark
from tests.fakes.memory import MemoryMerchantStore, MemoryStateStore
from tests.simulation.chain import NO_HIDDEN, chained, score_of

POISONED = "computation"
"""Reason of a rejected record that has an id."""


class Violation(Exception):
    """Violation of a rule that must hold.

    Attributes:
        rule: name of the rule.
    """

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


@dataclass(frozen=True)
class Entry:
    """Expected result of a record of the transactions topic.

    Attributes:
        rejected: the reason, if the record cannot be scored.
        instruction: the instruction of a control record, which produces no score.
        content: besides the id, the content that a duplicate has in common with it.
        is_repeated: the record is a duplicate in its account, and produces nothing.
        previous: the offset before it in the account's state; None if the state begins here.
        asked: hash of the record's value if the record asks for an answer.
    """

    account: str = ""
    merchant: str = ""
    amount: float = 0.0
    transaction_id: str = ""
    content: str = ""
    rejected: str | None = None
    instruction: bytes | None = None
    is_repeated: bool = False
    is_warm: bool = False
    previous: int | None = None
    asked: bytes | None = None

    @property
    def is_applied(self) -> bool:
        """Whether the record produces a state and a score."""
        return self.rejected is None and self.instruction is None and not self.is_repeated

    @property
    def place(self) -> tuple[int, int]:
        """Slot and hash under which the store keeps the transaction's note."""
        return merchant_slot(self.merchant), transaction_hash(self.transaction_id)


@dataclass
class PublishedScore:
    """A published score.

    Attributes:
        place: its offset in the scores partition.
        merchant: its merchant's features, as float32.
        is_late: its writer was not the partition's owner when the broker appended it.
    """

    place: int
    score: float
    merchant: bytes
    decision: str
    is_late: bool


@dataclass(frozen=True)
class Conclusion:
    """A poll that a worker publishes, saves and acks.

    Attributes:
        generation: the group's generation when the worker fetched the poll.
        known: by partition, an offset in its scores. The worker knew every score before this
            offset when it began to compute the poll.
    """

    generation: int
    known: dict[int, int]


@dataclass
class _Account:
    """An account's history in the part of its partition's log that exists so far."""

    last: int | None = None
    last_record_ms: int = 0
    ids: list[tuple[str, str]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class PartitionAudit:
    """Audit of one partition of the transactions topic, its scores and its states.

    Args:
        ttl_ms: an account that is silent for longer begins with an empty state.
        log_id: the topic's id.
    """

    def __init__(
        self, number: int, topic: str, codec: StateCodec, ttl_ms: int, log_id: bytes
    ) -> None:
        self.number = number
        self.log_id = log_id
        self.entries: list[Entry] = []
        self.published_scores: dict[int, list[PublishedScore]] = {}
        self.watermark = 0
        self.furthest = 0
        self._source_prefix = f"{topic}:{number}:"
        self._accounts: dict[str, _Account] = {}
        self._ttl_ms = ttl_ms
        self._possible: dict[int, set[bytes]] = {}
        place = codec.dtype.fields
        assert place is not None
        self._size = codec.size_bytes
        self._hidden = place["hidden"][1]
        self._last_offset = place["last_offset"][1]

    # the log -----------------------------------------------------------------------------

    def produced(self, entry: Entry, record_ms: int) -> Entry:
        """Record that the log has a new record; return its expected result."""
        offset = len(self.entries)
        if entry.instruction == FORGET:
            account = self._accounts.setdefault(entry.account, _Account())
            account.last, account.ids = None, []
            account.offsets.append(offset)
        elif entry.rejected is None and entry.instruction is None:
            account = self._accounts.setdefault(entry.account, _Account())
            if (entry.transaction_id, entry.content) in account.ids[-RECENT_IDS:]:
                entry = Entry(**{**vars(entry), "is_repeated": True})
            else:
                if record_ms - account.last_record_ms > self._ttl_ms:
                    account.last, account.ids = None, []
                entry = Entry(**{**vars(entry), "previous": account.last})
                account.last = offset
                account.last_record_ms = max(account.last_record_ms, record_ms)
                account.ids.append((entry.transaction_id, entry.content))
                account.offsets.append(offset)
        self.entries.append(entry)
        return entry

    def possible(self, offset: int | None) -> set[bytes]:
        """Return the hidden states after a transaction that its published scores allow."""
        if offset is None:
            return {NO_HIDDEN}
        found = self._possible.get(offset)
        if found is None:
            entry = self.entries[offset]
            found = {
                chained(before, offset, entry.amount, published.merchant)
                for before in self.possible(entry.previous)
                for published in self.published_scores.get(offset, ())
            }
            self._possible[offset] = found
        return found

    # scores ------------------------------------------------------------------------------

    def scored(self, place: int, value: bytes | None, is_late: bool, known: int) -> None:
        """Check a score that the broker appended to the scores partition.

        Raises:
            Violation: the score does not follow from the log, or its worker knew that it was
                published before.
        """
        logged = read_score(value, self._source_prefix, place)
        if logged is None:
            raise Violation("what is scored", f"no score of partition {self.number}: {value!r}")
        offset, kept = logged
        if offset >= len(self.entries) or not self.entries[offset].is_applied:
            raise Violation("what is scored", f"a score of {self._source_prefix}{offset}")
        score = float(np.float32(kept.score.score))  # its shortest decimal names one float32
        published = PublishedScore(place, score, _merchant(kept), kept.score.decision, is_late)
        before = self.published_scores.setdefault(offset, [])
        entry = self.entries[offset]
        if not any(
            score_of(chained(hidden, offset, entry.amount, published.merchant)) == published.score
            for hidden in self.possible(entry.previous)
        ):
            raise Violation("score", f"that of {self._source_prefix}{offset} is not the log's")
        self._check_published_before(offset, published, before, known)
        if all(other.merchant != published.merchant for other in before):
            self._possible = {k: v for k, v in self._possible.items() if k < offset}
        before.append(published)

    def _check_published_before(
        self, offset: int, published: PublishedScore, before: Sequence[PublishedScore], known: int
    ) -> None:
        if not before:
            return
        source = f"{self._source_prefix}{offset}"
        if before[0].place < known:
            raise Violation("score again", f"its worker knew the score of {source}")
        if not published.is_late and not any(other.is_late for other in before):
            raise Violation("score again", f"{source}, and no zombie had a part in it")

    # states ------------------------------------------------------------------------------

    def check_states(self, store: MemoryStateStore) -> None:
        """Check that the store's states are computed from the log up to the watermark.

        Raises:
            Violation: they differ from the log.
        """
        value = store.watermarks.get(self.number)
        if value is not None and Watermark.from_bytes(value).log_id != self.log_id:
            raise Violation("states", f"those of {self.number} are of a log before")
        states = {a: state for (p, a), state in store.states.items() if p == self.number}
        end = 0 if value is None else Watermark.from_bytes(value).next_offset
        if end > len(self.entries):
            raise Violation("states", f"the watermark of {self.number} is past its log")
        self.watermark = end
        self.furthest = max(self.furthest, end)
        for name, account in self._accounts.items():
            last = max((offset for offset in account.offsets if offset < end), default=None)
            if last is not None and self.entries[last].instruction == FORGET:
                last = None
            self._check_state(name, last, states.pop(name, None))
        if states:
            raise Violation("states", f"accounts that the log has not: {sorted(states)}")
        self._check_answers(store, end)

    def _check_answers(self, store: MemoryStateStore, end: int) -> None:
        """Check that exactly the records before the watermark that ask for an answer have one."""
        expected: dict[str, tuple[int, Entry]] = {}
        for offset, entry in enumerate(self.entries[:end]):
            is_rejected = entry.rejected == POISONED and entry.transaction_id not in expected
            if entry.asked is not None and (entry.is_applied or is_rejected):
                expected[entry.transaction_id] = offset, entry
        for name in {entry.transaction_id for entry in self.entries}:
            value = store.answers.get((self.number, name))
            found = None if value is None else StoredAnswer.from_bytes(value)
            if (found is None) != (name not in expected):
                raise Violation("answers", f"that of {name} in {self.number} is {found}")
            if found is None:
                continue
            offset, entry = expected[name]
            if found.content != entry.asked:
                raise Violation("answers", f"that of {name} is of another record")
            if entry.rejected is not None:
                if found.kind != "R" or found.reason != entry.rejected:
                    raise Violation("answers", f"{name} was rejected, not {found}")
            elif found.kind != "A" or found.number not in {
                score.place for score in self.published_scores.get(offset, ())
            }:
                raise Violation("answers", f"{found} is no score of {name}")

    def _check_state(self, name: str, last: int | None, state: bytes | None) -> None:
        if last is None or state is None:
            if last is not None or state is not None:
                what = "is missing" if state is None else "is of no transaction"
                raise Violation("states", f"that of {name} in {self.number} {what}")
            return
        at = self._last_offset
        found = int.from_bytes(state[at : at + 8], "little")
        if len(state) != self._size or found != last:
            raise Violation(
                "states", f"that of {name} in {self.number} is of offset {found}, not {last}"
            )
        if state[self._hidden : self._hidden + 8] not in self.possible(last):
            raise Violation("states", f"that of {name} in {self.number} is not its log's at {last}")


def _merchant(kept: LoggedScore) -> bytes:
    features = kept.merchant_raw()
    if features is None:
        raise Violation("what is scored", "a score without its merchant's features")
    return np.array(features, np.float32).tobytes()


@dataclass
class LabelAudit:
    """Audit of the labels topic and the merchants' profiles.

    Attributes:
        bookings: for each partition, the labels that must be recorded, by offset.
        ends: the end offset of each partition.
        recorded_to: for each partition and slot, the furthest offset to which labels were recorded.
        weights: the scorer's merchant weights of a transaction, by slot and hash. Several
            transactions may have the same id.
    """

    bookings: list[dict[int, MerchantLabel]]
    ends: list[int]
    recorded_to: list[list[int]] = field(default_factory=list)
    weights: dict[tuple[int, int], set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recorded_to = [[0] * MERCHANT_SLOTS for _ in self.ends]

    def check(self, store: MemoryMerchantStore, merchant: str, partition: int) -> None:
        """Check a merchant's known frauds against its labels up to its slot's labels offset.

        The newest label of a transaction counts. A fraud has the weight of its label. Without
        one it has the scorer's weight if a note exists, and the full weight otherwise.

        Raises:
            Violation: the frauds differ from the labels.
        """
        slot = merchant_slot(merchant)
        end = store.recorded.get((partition, slot), 0)
        expected = Profile()
        found = sorted(store.profile(merchant).frauds, key=_id)
        weights = {fraud.id_hash: fraud.weight for fraud in found}
        newest: dict[int, int] = {}
        label_weights: dict[int, int] = {}
        for offset, label in self.bookings[partition].items():
            name = label.entry.id_hash
            is_old = label.labelled_ms < newest.get(name, 0)
            if offset >= end or label.merchant_id != merchant or is_old:
                continue
            newest[name] = label.labelled_ms
            if label.label_weight is not None:
                label_weights[name] = label.label_weight
            note = store.notes.get((slot, name))
            weight = WEIGHT_MAX
            if note is not None and note.decision is not None:
                possible = self.weights[slot, name]
                weight = weights[name] if weights.get(name) in possible else min(possible)
            entry = replace(label.entry, weight=label_weights.get(name, weight))
            expected.record(entry, label.is_fraud)
        if found != sorted(expected.frauds, key=_id):
            raise Violation("labels", f"those of {merchant} are not recorded once each")


def _id(fraud: Fraud) -> int:
    return fraud.id_hash


class Auditor:
    """Auditor of one run.

    Args:
        topic: the full name of the transactions topic.
        found: called with each violation.
    """

    def __init__(
        self,
        *,
        topic: str,
        partitions: int,
        codec: StateCodec,
        ttl_ms: int,
        store: MemoryStateStore,
        merchants: MemoryMerchantStore,
        found: Callable[[Violation], None],
        log_id: bytes,
    ) -> None:
        self._new_audit = partial(PartitionAudit, topic=topic, codec=codec, ttl_ms=ttl_ms)
        self.partitions = [self._new_audit(p, log_id=log_id) for p in range(partitions)]
        # Earlier logs: the furthest watermark of each partition, and the transaction ids.
        self._furthest = [0] * partitions
        self._of_logs_before: set[str] = set()
        self.labels = LabelAudit([{} for _ in range(partitions)], [0] * partitions)
        self.alerts: dict[str, int] = {}
        self.dead_letters: set[tuple[str, int, int]] = set()
        self.replies: Counter[str] = Counter()
        self._score_values: set[tuple[int, bytes | None]] = set()
        self.data_were_lost = False  # a worker may then repeat earlier commits
        self._losses = 0
        # By writer id and note: the number of losses before the worker last wrote the note.
        self._noted: dict[tuple[int, tuple[int, int]], int] = {}
        # Notes that the store lost before the save of their transaction.
        self._cut_off: set[tuple[int, int]] = set()
        self._topic = topic
        self._store = store
        self._merchants = merchants
        self._found = found

    def check(self, check: Callable[[], None]) -> None:
        """Run a check and report its violation."""
        try:
            check()
        except Violation as violation:
            self._found(violation)

    def made_again(self, log_id: bytes) -> None:
        """Start a new audit because the transactions topic was deleted and made again.

        Workers may still save states of the old log while its watermark stands. They may also
        publish scores of it for a while. The audit ignores both.
        """
        for audit in self.partitions:
            self._furthest[audit.number] = max(self._furthest[audit.number], audit.furthest)
            self._of_logs_before.update(entry.transaction_id for entry in audit.entries)
        self.partitions = [self._new_audit(a.number, log_id=log_id) for a in self.partitions]
        self.alerts.clear()
        self.dead_letters.clear()
        self.data_were_lost = True  # offsets begin again

    def lost_data(self) -> None:
        """Record that both stores went back to an earlier moment."""
        self.data_were_lost = True
        self._losses += 1
        for audit in self.partitions:
            mark = self._mark(audit.number)
            is_of_log = mark is not None and mark.log_id == audit.log_id
            audit.watermark = mark.next_offset if mark is not None and is_of_log else 0

    def noted(self, writer: int, place: tuple[int, int]) -> None:
        """Record that a worker wrote the note of a transaction."""
        self._noted[writer, place] = self._losses

    def _mark(self, partition: int) -> Watermark | None:
        value = self._store.watermarks.get(partition)
        return None if value is None else Watermark.from_bytes(value)

    def _see_notes(self, audit: PartitionAudit, mark: Watermark) -> None:
        """Find the saved transactions whose notes the store lost before the save."""
        for entry in audit.entries[audit.watermark : mark.next_offset]:
            if entry.is_applied:
                losses = self._noted.get((mark.writer, entry.place))
                if losses is not None and losses < self._losses:
                    self._cut_off.add(entry.place)

    def states_changed(self, partition: int) -> None:
        """Check a partition's states after a write to them or to its watermark."""
        audit = self.partitions[partition]
        mark = self._mark(partition)
        if mark is not None and mark.log_id != audit.log_id:
            self._furthest[partition] = max(self._furthest[partition], mark.next_offset)
            audit.watermark = 0
            return
        if mark is not None:
            self._see_notes(audit, mark)
        self.check(lambda: self.partitions[partition].check_states(self._store))

    def label_recorded(self, partition: int, label: MerchantLabel) -> None:
        """Check the merchant of a label after an attempt to record the label."""
        merchant = label.merchant_id
        self.check(lambda: self.labels.check(self._merchants, merchant, partition))

    def labels_are_recorded(self, partition: int) -> bool:
        """Return whether all labels of a partition are recorded."""
        return self._merchants.all_recorded_to(partition) == self.labels.ends[partition]

    def recorded_to(self, partition: int, slots: Iterable[int]) -> None:
        """Update the furthest labels offset of each slot."""
        furthest = self.labels.recorded_to[partition]
        for slot in slots:
            furthest[slot] = max(furthest[slot], self._merchants.recorded.get((partition, slot), 0))

    def alerted(self, value: bytes | None) -> None:
        """Count an alert that the broker appended."""
        source = decode_alert(value or b"").source
        self.alerts[source] = self.alerts.get(source, 0) + 1

    def committed(self, place: tuple[str, int], offset: int, before: int | None) -> None:
        """Check an offset that the group commits for a topic's partition."""
        topic, partition = place
        name = f"{topic} {partition}"

        def check() -> None:
            if topic == self._topic:
                furthest = max(self.partitions[partition].furthest, self._furthest[partition])
            else:
                furthest = min(self.labels.recorded_to[partition])
            if offset > furthest:
                raise Violation("commit", f"{offset} of {name}, which is done up to {furthest}")
            if before is not None and offset < before and not self.data_were_lost:
                raise Violation("commit", f"{name} back from {before} to {offset}")

        self.check(check)

    def scored(
        self, partition: int, place: int, value: bytes | None, is_late: bool, known: int
    ) -> None:
        """Check a score that the broker appended, unless it is of an earlier log."""
        self._score_values.add((place, value))
        of = decode_published(value)
        if of is not None and of.transaction_id in self._of_logs_before:
            return
        self.check(lambda: self.partitions[partition].scored(place, value, is_late, known))

    def replied(self, replies: Iterable[Reply]) -> None:
        """Check that each reply with a score has the bytes at its offset in a partition."""
        for reply in replies:
            self.replies[reply.kind] += 1
            if reply.kind == "A" and (reply.offset, reply.value) not in self._score_values:
                self._found(Violation("replies", f"{reply} is no score"))

    def rejected(self, headers: dict[str, bytes]) -> None:
        """Record a dead letter that the broker appended."""
        if headers["topic"].decode() == self._topic:
            place = int(headers["partition"]), int(headers["offset"])
            self.dead_letters.add((headers["reason"].decode(), *place))

    def finish(self) -> None:
        """Check the whole run at its end, when all work is done."""
        for partition in self.partitions:
            self.check(partial(self._finish_partition, partition))
        for number, bookings in enumerate(self.labels.bookings):
            for label in bookings.values():
                self.label_recorded(number, label)
        self.check(self._finish_notes)

    def _finish_notes(self) -> None:
        """Check that every needed note exists and has a decision that was published."""
        published: dict[tuple[int, int], set[str]] = {}
        needed: set[tuple[int, int]] = set()
        for partition in self.partitions:
            for offset, entry in enumerate(partition.entries):
                if not entry.is_applied:
                    continue
                place = entry.place
                decisions = {DECISIONS[0]} if entry.is_warm else set()
                decisions |= {one.decision for one in partition.published_scores.get(offset, ())}
                published.setdefault(place, set()).update(decisions)
                if DECISIONS[0] not in decisions or min(self.labels.weights[place]) < WEIGHT_MAX:
                    needed.add(place)
        for place in needed:
            note = self._merchants.notes.get(place)
            if place in self._cut_off and (note is None or note.decision is None):
                continue  # docs/guarantees.md excludes this case
            if note is None or note.decision not in published[place]:
                raise Violation("notes", f"of {place} is remembered {note}, not {published[place]}")

    def _finish_partition(self, partition: PartitionAudit) -> None:
        for offset, entry in enumerate(partition.entries):
            source = f"{self._topic}:{partition.number}:{offset}"
            if entry.rejected is not None:
                if (entry.rejected, partition.number, offset) not in self.dead_letters:
                    raise Violation("rejected", f"{source} is not in dead-letter")
            elif entry.is_applied:
                published = partition.published_scores.get(offset)
                if not published:
                    raise Violation("lost", f"no score of {source}")
                raises = [one.decision != DECISIONS[0] for one in published]
                if all(raises) and not entry.is_warm and source not in self.alerts:
                    raise Violation("alerts", f"none of {source}")
                if entry.is_warm and source in self.alerts:
                    raise Violation("alerts", f"one of {source}, which is warm")
        partition.check_states(self._store)
