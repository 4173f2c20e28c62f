"""What came out, against what was sent: counted here, and verified as `recur verify` does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from pipeline.audit.result import Verification
from pipeline.audit.verifier import VerifyOptions, verify
from pipeline.kafka.partition_reader import kafka_readers
from pipeline.kafka.topics import TopicRole, partition_count
from pipeline.messages.decision import DECISIONS
from pipeline.messages.scores import decode_alert
from pipeline.replay.score_counter import ScoreCounter
from pipeline.settings import Settings
from pipeline.storage.account_state import StateCodec
from pipeline.storage.state_store import Load as StatesWanted
from pipeline.storage.state_store import RedisStateStore
from tests.faults.workload import NO_TRANSACTION, Load

READ_RECORDS = 4096
APPROVE = DECISIONS[0]


class _Said(msgspec.Struct, frozen=True, gc=False):
    """What of a score tells whether it demands an alert."""

    source: str
    decision: str


_decode = msgspec.json.Decoder(_Said).decode


@dataclass(frozen=True)
class Outcome:
    """Of one fault.

    Attributes:
        transactions: distinct ones that the broker took.
        lost: of them without a score.
        twice: applications to states beyond one for each transaction.
        too_few: transactions that no state counts.
        conflicting: scores that differ from the first one of their transaction.
        duplicates: transactions with more than one score.
        strangers: scores of what is no transaction.
        alerts_missing: scores that demand an alert which was never published.
        verification: what `recur verify` finds.
    """

    transactions: int
    lost: int
    twice: int
    too_few: int
    conflicting: int
    duplicates: int
    strangers: int
    alerts_missing: int
    verification: Verification

    def complaints(self, *, allow_conflicts: bool) -> list[str]:
        """What contradicts the guarantees, each in words."""
        found = self.verification
        wrong = {
            "transactions lost": self.lost,
            "applied twice": self.twice,
            "not in a state": self.too_few,
            "scores of what is no transaction": self.strangers,
            "alerts missing": self.alerts_missing,
            "accounts other than the log says": found.different_accounts,
            "scores missing to recur verify": found.missing,
            "scores that recur verify does not expect": found.unexpected,
            "states without log": found.without_log or 0,
            "partitions without a watermark": len(found.lost_partitions),
            "records not applied": found.not_applied,
        }
        if not allow_conflicts:
            wrong["conflicting scores"] = max(self.conflicting, found.conflicting)
        lines = [f"{count:,} {what}" for what, count in wrong.items() if count]
        return lines + [
            f"{d.account_id} in partition {d.partition}, from offset {d.offset}: {d.what}"
            for d in found.differences[:3]
        ]


class _NoBar:
    """The progress of verifying is not shown: it takes seconds."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, what: str, done: int, fraction: float) -> None:
        return None


async def find_outcome(settings: Settings, checkpoint: Checkpoint, load: Load) -> Outcome:
    """Compare a settled system with its load.

    Raises:
        RecurError: broker or Redis is away.
    """
    numbers = load.numbers_sent()
    expected = np.unique(numbers[numbers != NO_TRANSACTION])
    tally = ScoreCounter(load.transactions_made(), _numbers_of)
    demanding: set[str] = set()
    async for records in topic_records(settings, "scores"):
        tally.add(records)
        said = [_decode(record.value) for record in records]
        demanding |= {score.source for score in said if score.decision != APPROVE}
    alerted = {
        decode_alert(record.value).source
        async for records in topic_records(settings, "alerts")
        for record in records
    }
    is_expected = np.zeros(len(tally.times), bool)
    is_expected[expected] = True
    applied = await _applied_by_account(settings, checkpoint)
    twice, too_few = _compare_counts(applied, load.transactions_of_accounts())
    return Outcome(
        transactions=len(expected),
        lost=int((is_expected & (tally.times == 0)).sum()),
        twice=twice,
        too_few=too_few,
        conflicting=tally.contradictions,
        duplicates=tally.repeated,
        strangers=tally.strangers + int((~is_expected & (tally.times > 0)).sum()),
        alerts_missing=len(demanding - alerted),
        verification=await verify(settings, checkpoint, VerifyOptions(), _NoBar()),
    )


async def topic_records(settings: Settings, role: TopicRole) -> AsyncIterator[list[Any]]:
    """Everything committed that a topic holds now, some records at a time.

    Raises:
        RecurError: the broker is away.
    """
    topic = settings.topic(role)
    open_reader = kafka_readers(settings)
    for partition in range(await partition_count(settings, topic) or 0):
        async with open_reader(topic, partition, 0) as reader:
            bounds = await reader.bounds()
            while records := await reader.read(bounds.end, READ_RECORDS):
                yield records


def _numbers_of(transaction_ids: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of the simulator's transactions; -1 for any other."""
    return np.array(
        [
            int(name[1:]) if name[:1] == "T" and name[1:].isdigit() else -1
            for name in transaction_ids
        ],
        np.int64,
    )


async def _applied_by_account(settings: Settings, checkpoint: Checkpoint) -> dict[str, int]:
    """How many transactions each account's states in Redis count."""
    architecture = checkpoint.network.architecture
    codec = StateCodec(architecture.layers, architecture.hidden_size)
    store = RedisStateStore.from_settings(settings, checkpoint.digest)
    found: dict[tuple[int, str], int] = {}  # SCAN may name a key twice
    try:
        async for places in store.accounts():
            by_partition: dict[int, list[str]] = {}
            for partition, account in places:
                by_partition.setdefault(partition, []).append(account)
            for partition, accounts in by_partition.items():
                (loaded,) = await store.load([StatesWanted(partition, accounts)])
                states, _, _ = codec.decode(loaded.states)
                for account, count in zip(accounts, states.history.count.tolist(), strict=True):
                    found[partition, account] = count
    finally:
        await store.close()
    counts: dict[str, int] = {}
    for (_, account), count in found.items():
        counts[account] = counts.get(account, 0) + count
    return counts


def _compare_counts(applied: Mapping[str, int], sent: Mapping[str, int]) -> tuple[int, int]:
    """How many transactions states count too often, and too seldom."""
    differences = [
        applied.get(account, 0) - sent.get(account, 0) for account in applied.keys() | sent.keys()
    ]
    return sum(d for d in differences if d > 0), -sum(d for d in differences if d < 0)
