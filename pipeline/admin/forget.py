"""Manual command: erase an account's state (`recur state forget`).

The command appends a control record to the transactions topic, after the account's own records.
Workers, replays and recomputations apply it in the order of the log. They apply what comes before
it, then erase the state; a later transaction starts a new one. The receipt lists what is erased,
and what remains until when.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from model.transaction import ID_MAX_CHARACTERS
from pipeline.admin.control import ControlRecord, send_control_records
from pipeline.admin.inspect_account import utc
from pipeline.admin.wait import wait_until_applied
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError, SettingsError
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.topics import Retention, TopicRole, group_members, partition_count, retentions
from pipeline.messages.control import FORGET
from pipeline.settings import Settings
from pipeline.storage.account_state import StateCodec
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_scan import StateCopy, StateScan
from pipeline.storage.state_store import Load, RedisStateStore
from pipeline.tables import pair_lines

_LABELS_NOTE = "and what producers send about the account from now on"


@dataclass(frozen=True)
class ForgetReceipt:
    """Outcome of forgetting an account.

    Attributes:
        records: the control records; empty for a dry run.
        partitions: partitions that get a control record.
        copies: states in Redis before the command, of this model and of others.
        applied_ms: when the command saw that the workers had applied the record, epoch ms.
        is_back: whether the account has made transactions since, and has a new state.
        retentions: retention of each topic.
    """

    account_id: str
    model: str
    topic: str
    partitions: Sequence[int]
    records: Sequence[ControlRecord]
    copies: Sequence[StateCopy]
    applied_ms: int | None
    is_back: bool
    retentions: dict[TopicRole, Retention | None]


class ForgetCommand:
    """Erases one account.

    Args:
        settings: the workers' settings.
        console: shows progress.

    Raises:
        SettingsError: the account id is empty or too long.
    """

    def __init__(self, settings: Settings, account_id: str, console: Console) -> None:
        if not 0 < len(account_id) <= ID_MAX_CHARACTERS:
            raise SettingsError(f"an account id has 1 to {ID_MAX_CHARACTERS} characters")
        self._settings = settings
        self._account_id = account_id
        self._console = console
        checkpoint = load_checkpoint(settings)
        self._model = checkpoint.digest
        self._codec = StateCodec.of(checkpoint)

    async def run(self, *, dry_run: bool, wait_seconds: float) -> ForgetReceipt:
        """Append the control records, and wait until the workers have applied them.

        Args:
            dry_run: report what would happen, and change nothing.
            wait_seconds: longest wait; 0 does not wait.

        Raises:
            RecurError: Kafka or Redis does not answer.
        """
        settings = self._settings
        topic = settings.topic("transactions")
        count = await partition_count(settings, topic)
        if count is None:
            raise RecurError(
                f"there is no topic {topic} at {settings.kafka_bootstrap_servers}: correct "
                "RECUR_TRANSACTIONS_TOPIC or RECUR_TOPIC_PREFIX"
            )
        try:
            async with StateScan(settings) as scan:
                copies = await scan.copies(self._account_id)
        except StoreUnavailableError as error:
            raise RecurError(
                f"Redis does not answer ({error}): start it, or set RECUR_REDIS_URL"
            ) from error
        partitions = self._partitions(copies, count)
        records: list[ControlRecord] = []
        applied_ms, is_back = None, False
        if not dry_run:
            key = self._account_id.encode()
            records = await send_control_records(settings, FORGET, partitions, key)
            applied_ms, is_back = await self._wait(records, wait_seconds)
        return ForgetReceipt(
            account_id=self._account_id,
            model=self._model,
            topic=topic,
            partitions=partitions,
            records=records,
            copies=copies,
            applied_ms=applied_ms,
            is_back=is_back,
            retentions=await retentions(settings),
        )

    def _partitions(self, copies: Sequence[StateCopy], count: int) -> list[int]:
        """Return the partitions of the account's states, else the one of its key."""
        found = sorted({copy.partition for copy in copies if copy.partition < count})
        return found or [key_partition(self._account_id.encode(), count)]

    async def _wait(
        self, records: Sequence[ControlRecord], seconds: float
    ) -> tuple[int | None, bool]:
        """Wait; return when the records were applied, and whether there is a state again."""
        if not seconds or not await group_members(self._settings):
            return None, False
        store = RedisStateStore.from_settings(self._settings, self._model)
        targets = {record.partition: record.offset + 1 for record in records}
        try:
            if not await wait_until_applied(store, targets, "applying", seconds, self._console):
                return None, False
            applied_ms = time.time_ns() // 1_000_000
            return applied_ms, await self._has_state(store, records)
        finally:
            await store.close()

    async def _has_state(self, store: RedisStateStore, records: Sequence[ControlRecord]) -> bool:
        """Check whether the account has made transactions since.

        Raises:
            RecurError: the workers did not erase the state.
        """
        loads = [Load(record.partition, [self._account_id]) for record in records]
        replies = await store.load(loads)
        states, loaded, _ = self._codec.decode([reply.states[0] for reply in replies])
        for first, is_there, record in zip(states.first_offset, loaded, records, strict=True):
            if is_there and first <= record.offset:
                raise RecurError(
                    "the workers have passed the control record and the state is still there:"
                    " their version does not know the record. Restart them with this version,"
                    " and run the command again"
                )
        return bool(loaded.any())


def describe(receipt: ForgetReceipt, now_ms: int, has_workers: bool) -> Iterator[str]:
    """Yield the lines of the receipt, for a person to keep.

    Args:
        now_ms: wall clock, epoch milliseconds.
        has_workers: whether the consumer group has members.
    """
    rows: list[tuple[str, str]] = []
    where = ", ".join(f"{receipt.topic}-{partition}" for partition in receipt.partitions)
    if not receipt.records:
        yield f"account {receipt.account_id} would be forgotten; nothing is done"
        rows.append(("control record", f"would go to {where}"))
    elif receipt.applied_ms is None:
        yield f"account {receipt.account_id} will be forgotten"
    else:
        yield f"account {receipt.account_id} is forgotten"
    for record in receipt.records:
        text = f"{receipt.topic}-{record.partition}, offset {record.offset}"
        rows.append(("control record", f"{text}, {utc(record.timestamp_ms)}"))
    if receipt.applied_ms is not None:
        rows.append(("applied", f"by {utc(receipt.applied_ms)}, model {receipt.model}"))
    elif receipt.records:
        why = "the workers have not reached it" if has_workers else "no worker runs"
        rows.append(("applied", f"not yet: {why}; workers apply it in the log's order"))
    rows += _erased_rows(receipt)
    rows += _other_model_rows(receipt, now_ms)
    rows += _remaining_rows(receipt, now_ms)
    yield from pair_lines(rows)


def _erased_rows(receipt: ForgetReceipt) -> Iterator[tuple[str, str]]:
    own = [copy for copy in receipt.copies if copy.model == receipt.model]
    size = sum(copy.size_bytes for copy in own)
    verb = "erased" if receipt.applied_ms is not None else "to be erased"
    yield verb, f"its state in Redis, {size} bytes" if own else "no state: Redis had none"
    if receipt.is_back:
        yield "", "the account has made transactions since, and has a new state"
    yield "", "nothing else in Redis holds the account's id (merchants' profiles and alerts are"
    yield "", "kept under hashes of transaction ids); logs and metrics never do"


def _other_model_rows(receipt: ForgetReceipt, now_ms: int) -> Iterator[tuple[str, str]]:
    name = "other models"
    for copy in receipt.copies:
        if copy.model != receipt.model:
            end = "no end" if copy.expires_ms is None else utc(now_ms + copy.expires_ms)
            yield (
                name,
                f"{copy.model} has a state in {receipt.topic}-{copy.partition}: until its"
                f" workers reach the control record, else until {end}",
            )
            name = ""


def _remaining_rows(receipt: ForgetReceipt, now_ms: int) -> Iterator[tuple[str, str]]:
    """Yield rows of what the topics still hold; no worker reads it back into a state."""
    yield "remains", "records of the topics, until retention deletes them, at the latest"
    for role, retention in receipt.retentions.items():
        topic = role if role != "dead_letter" else "dead-letter"
        if retention is None:
            until = "as long as its retention says (this user may not read it)"
        elif retention.longest_ms is None:
            until = "for ever: the topic does not delete by age"
        else:
            until = utc(now_ms + retention.longest_ms)
        yield "", f"  {topic:12}  {until}"
    yield "", f"  {_LABELS_NOTE}"
    yield "", "Redis's snapshot and append-only file until rewritten, and backups of either"


async def forget_lines(
    settings: Settings, account_id: str, *, dry_run: bool, wait_seconds: float, console: Console
) -> tuple[list[str], bool]:
    """Run `recur state forget ACCOUNT`; return its output, and whether all of it is done.

    Raises:
        RecurError: the account cannot be forgotten; the message says why.
    """
    command = ForgetCommand(settings, account_id, console)
    receipt = await command.run(dry_run=dry_run, wait_seconds=wait_seconds)
    has_workers = receipt.applied_ms is not None or await group_members(settings) > 0
    lines = list(describe(receipt, time.time_ns() // 1_000_000, has_workers))
    return lines, dry_run or wait_seconds == 0 or receipt.applied_ms is not None
