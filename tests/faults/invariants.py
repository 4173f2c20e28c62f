"""Invariants after a fault: counts of scores and states, and the result of `recur verify`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from model.checkpoint import Checkpoint
from pipeline.audit.result import Verification
from pipeline.audit.verifier import VerifyOptions, verify
from pipeline.kafka.partition_reader import kafka_readers
from pipeline.kafka.topics import TopicRole, partition_count
from pipeline.messages.decision import DECISIONS
from pipeline.messages.scores import decode_alert
from pipeline.progress import Bar
from pipeline.replay.score_counter import ScoreCounter
from pipeline.settings import Settings
from pipeline.storage.account_state import StateCodec
from pipeline.storage.state_store import Load as StatesWanted
from pipeline.storage.state_store import RedisStateStore
from tests.faults.workload import NO_TRANSACTION, Workload

READ_RECORDS = 4096
APPROVE = DECISIONS[0]


class _ScoreDecision(msgspec.Struct, frozen=True, gc=False):
    """Fields of a score that decide whether it needs an alert."""

    source: str
    decision: str


_decode = msgspec.json.Decoder(_ScoreDecision).decode


@dataclass(frozen=True)
class Invariants:
    """Counts after one fault that show whether the guarantees held.

    Attributes:
        transactions: distinct transactions that the broker accepted.
        lost: transactions without a score.
        twice: surplus applications of transactions to states.
        too_few: transactions that no state counts.
        conflicting: scores that differ from the first score of their transaction.
        duplicates: transactions with more than one score.
        unknown: scores of records that are not transactions.
        alerts_missing: scores that need an alert but have none.
        verification: result of `recur verify`.
    """

    transactions: int
    lost: int
    twice: int
    too_few: int
    conflicting: int
    duplicates: int
    unknown: int
    alerts_missing: int
    verification: Verification

    def complaints(self, *, allow_conflicts: bool) -> list[str]:
        """Describe each violation of the guarantees."""
        found = self.verification
        wrong = {
            "transactions lost": self.lost,
            "applied twice": self.twice,
            "not in a state": self.too_few,
            "scores of records that are not transactions": self.unknown,
            "alerts missing": self.alerts_missing,
            "accounts that differ from the log": found.different_accounts,
            "scores that recur verify misses": found.missing,
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


async def check_invariants(
    settings: Settings, checkpoint: Checkpoint, workload: Workload
) -> Invariants:
    """Compare a settled system with its workload.

    Raises:
        RecurError: broker or Redis is unreachable.
    """
    numbers = workload.numbers_sent()
    expected = np.unique(numbers[numbers != NO_TRANSACTION])
    counter = ScoreCounter(workload.transactions_made(), _numbers_of)
    alert_sources: set[str] = set()
    async for records in topic_records(settings, "scores"):
        counter.add(records)
        scores = [_decode(record.value) for record in records]
        alert_sources |= {score.source for score in scores if score.decision != APPROVE}
    alerted = {
        decode_alert(record.value).source
        async for records in topic_records(settings, "alerts")
        for record in records
    }
    is_expected = np.zeros(len(counter.times), bool)
    is_expected[expected] = True
    applied = await _applied_by_account(settings, checkpoint)
    twice, too_few = _compare_counts(applied, workload.transactions_of_accounts())
    return Invariants(
        transactions=len(expected),
        lost=int((is_expected & (counter.times == 0)).sum()),
        twice=twice,
        too_few=too_few,
        conflicting=counter.contradictions,
        duplicates=counter.duplicates,
        unknown=counter.unknown + int((~is_expected & (counter.times > 0)).sum()),
        alerts_missing=len(alert_sources - alerted),
        verification=await verify(settings, checkpoint, VerifyOptions(), Bar(Console(quiet=True))),
    )


async def topic_records(settings: Settings, role: TopicRole) -> AsyncIterator[list[Any]]:
    """Read all committed records of a topic, some at a time.

    Raises:
        RecurError: the broker is unreachable.
    """
    topic = settings.topic(role)
    open_reader = kafka_readers(settings)
    for partition in range(await partition_count(settings, topic) or 0):
        async with open_reader(topic, partition, 0) as reader:
            bounds = await reader.bounds()
            while records := await reader.read(bounds.end, READ_RECORDS):
                yield records


def _numbers_of(transaction_ids: Sequence[str]) -> NDArray[np.int64]:
    """Find the simulator's numbers of transactions; -1: not from the simulator."""
    return np.array(
        [
            int(name[1:]) if name[:1] == "T" and name[1:].isdigit() else -1
            for name in transaction_ids
        ],
        np.int64,
    )


async def _applied_by_account(settings: Settings, checkpoint: Checkpoint) -> dict[str, int]:
    """Read how many transactions the states in Redis count, by account."""
    codec = StateCodec.of(checkpoint)
    store = RedisStateStore.from_settings(settings, checkpoint.digest)
    found: dict[tuple[int, str], int] = {}  # SCAN may return a key twice
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
    """Count the transactions that states have too often, and those they miss."""
    differences = [
        applied.get(account, 0) - sent.get(account, 0) for account in applied.keys() | sent.keys()
    ]
    return sum(d for d in differences if d > 0), -sum(d for d in differences if d < 0)
