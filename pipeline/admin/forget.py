"""``recur state forget``: an account is erased by an instruction in the log.

The instruction is a record of the transactions topic behind the account's own, so that workers,
replays and whoever computes states again come to it in the account's order: what is before it
is applied and then forgotten, what is after it begins anew. The receipt says what is erased,
and what remains until when.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console

from model.transaction import ID_MAX_CHARACTERS
from pipeline.admin.control import Place, send_instruction
from pipeline.admin.wait import until_applied
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

_LABELS_NOTE = "and what producers send of it from now on"


@dataclass(frozen=True)
class Receipt:
    """What was done to forget an account.

    Attributes:
        places: where the instruction lies; none in a dry run.
        partitions: where it belongs.
        copies: states that there were, of this model and of others.
        applied_ms: when it was seen that the workers had applied it, epoch milliseconds.
        is_back: the account has made transactions since, and has a new state.
        retentions: of the topics.
    """

    account_id: str
    model: str
    topic: str
    partitions: Sequence[int]
    places: Sequence[Place]
    copies: Sequence[StateCopy]
    applied_ms: int | None
    is_back: bool
    retentions: dict[TopicRole, Retention | None]


class Forgetting:
    """One account that is to be forgotten.

    Args:
        settings: the workers'.
        console: where progress is shown.

    Raises:
        SettingsError: this is no account id.
    """

    def __init__(self, settings: Settings, account_id: str, console: Console) -> None:
        if not 0 < len(account_id) <= ID_MAX_CHARACTERS:
            raise SettingsError(f"an account id has 1 to {ID_MAX_CHARACTERS} characters")
        self._settings = settings
        self._account_id = account_id
        self._console = console
        checkpoint = load_checkpoint(settings)
        self._model = checkpoint.digest
        architecture = checkpoint.network.architecture
        self._codec = StateCodec(architecture.layers, architecture.hidden_size)

    async def run(self, *, dry_run: bool, wait_seconds: float) -> Receipt:
        """Send the instruction and wait until it is applied.

        Args:
            dry_run: only say what would be done.
            wait_seconds: so long at most; 0 does not wait.

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
        places: list[Place] = []
        applied_ms, is_back = None, False
        if not dry_run:
            key = self._account_id.encode()
            places = await send_instruction(settings, FORGET, partitions, key)
            applied_ms, is_back = await self._wait(places, wait_seconds)
        return Receipt(
            account_id=self._account_id,
            model=self._model,
            topic=topic,
            partitions=partitions,
            places=places,
            copies=copies,
            applied_ms=applied_ms,
            is_back=is_back,
            retentions=await retentions(settings),
        )

    def _partitions(self, copies: Sequence[StateCopy], count: int) -> list[int]:
        """Where the account's records go: where its states are, else Kafka's default."""
        found = sorted({copy.partition for copy in copies if copy.partition < count})
        return found or [key_partition(self._account_id.encode(), count)]

    async def _wait(self, places: Sequence[Place], seconds: float) -> tuple[int | None, bool]:
        """When the instruction was seen to be applied, and whether there is a state again."""
        if not seconds or not await group_members(self._settings):
            return None, False
        store = RedisStateStore.from_settings(self._settings, self._model)
        targets = {place.partition: place.offset + 1 for place in places}
        try:
            if not await until_applied(store, targets, "applying", seconds, self._console):
                return None, False
            applied_ms = time.time_ns() // 1_000_000
            return applied_ms, await self._has_state(store, places)
        finally:
            await store.close()

    async def _has_state(self, store: RedisStateStore, places: Sequence[Place]) -> bool:
        """Whether the account has made transactions since."""
        replies = await store.load([Load(place.partition, [self._account_id]) for place in places])
        states, loaded, _ = self._codec.decode([reply.states[0] for reply in replies])
        for first, is_there, place in zip(states.first_offset, loaded, places, strict=True):
            if is_there and first <= place.offset:
                raise RecurError(
                    "the workers have passed the instruction and the state is still there: they"
                    " are of a version that does not know it. Start them anew with this version,"
                    " and run the command again"
                )
        return bool(loaded.any())


def describe(receipt: Receipt, now_ms: int, has_workers: bool) -> Iterator[str]:
    """The receipt, for a person to keep.

    Args:
        now_ms: wall clock, epoch milliseconds.
        has_workers: whether the consumer group has members.
    """
    rows: list[tuple[str, str]] = []
    where = ", ".join(f"{receipt.topic}-{partition}" for partition in receipt.partitions)
    if not receipt.places:
        yield f"account {receipt.account_id} would be forgotten; nothing is done"
        rows.append(("instruction", f"would go to {where}"))
    elif receipt.applied_ms is None:
        yield f"account {receipt.account_id} will be forgotten"
    else:
        yield f"account {receipt.account_id} is forgotten"
    for place in receipt.places:
        text = f"{receipt.topic}-{place.partition}, offset {place.offset}"
        rows.append(("instruction", f"{text}, {_utc(place.timestamp_ms)}"))
    if receipt.applied_ms is not None:
        rows.append(("applied", f"by {_utc(receipt.applied_ms)}, model {receipt.model}"))
    elif receipt.places:
        who = "the workers have not come to it yet" if has_workers else "no worker runs"
        rows.append(("applied", f"not yet: {who}; they will, in the log's order"))
    rows += _erased(receipt)
    rows += _others(receipt, now_ms)
    rows += _remaining(receipt, now_ms)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"  {name:{width}}  {text}"


def _erased(receipt: Receipt) -> Iterator[tuple[str, str]]:
    own = [copy for copy in receipt.copies if copy.model == receipt.model]
    size = sum(copy.size_bytes for copy in own)
    verb = "erased" if receipt.applied_ms is not None else "to be erased"
    yield verb, f"its state in Redis, {size} bytes" if own else "no state: Redis had none"
    if receipt.is_back:
        yield "", "it has made transactions since, and begun anew"
    yield "", "nothing else in Redis holds the account's id (merchants' profiles and alerts are"
    yield "", "kept under hashes of transaction ids); logs and metrics never do"


def _others(receipt: Receipt, now_ms: int) -> Iterator[tuple[str, str]]:
    name = "other models"
    for copy in receipt.copies:
        if copy.model != receipt.model:
            end = "no end" if copy.expires_ms is None else _utc(now_ms + copy.expires_ms)
            yield (
                name,
                f"{copy.model} has a state in {receipt.topic}-{copy.partition}: until its"
                f" workers come to the instruction, else until {end}",
            )
            name = ""


def _remaining(receipt: Receipt, now_ms: int) -> Iterator[tuple[str, str]]:
    """What the log still tells; a worker never reads it back into a state."""
    yield "remains", "records of the topics, until retention deletes them, at the latest"
    for role, retention in receipt.retentions.items():
        topic = role if role != "dead_letter" else "dead-letter"
        if retention is None:
            until = "as long as its retention says (this user may not ask)"
        elif retention.longest_ms is None:
            until = "for ever: the topic does not delete by age"
        else:
            until = _utc(now_ms + retention.longest_ms)
        yield "", f"  {topic:12}  {until}"
    yield "", f"  {_LABELS_NOTE}"
    yield "", "Redis's snapshot and append-only file until rewritten, and backups of either"


def _utc(timestamp_ms: int) -> str:
    return f"{datetime.fromtimestamp(timestamp_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


async def forget_lines(
    settings: Settings, account_id: str, *, dry_run: bool, wait_seconds: float, console: Console
) -> tuple[list[str], bool]:
    """What `recur state forget ACCOUNT` prints, and whether all that was asked is done.

    Raises:
        RecurError: it cannot be done; the message says why.
    """
    forgetting = Forgetting(settings, account_id, console)
    receipt = await forgetting.run(dry_run=dry_run, wait_seconds=wait_seconds)
    has_workers = receipt.applied_ms is not None or await group_members(settings) > 0
    lines = list(describe(receipt, time.time_ns() // 1_000_000, has_workers))
    return lines, dry_run or wait_seconds == 0 or receipt.applied_ms is not None
