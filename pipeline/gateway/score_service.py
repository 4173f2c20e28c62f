"""Scores for requests: claim the id, produce the record, wait for the worker's answer.

The answer key (:mod:`pipeline.storage.answer_store`) decides everything. Who sets the claim
produces; all others wait. A reply on the gateway's channel is only faster than the key: one that is
lost costs time, never an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.gateway.incoming import Incoming, decode_any
from pipeline.gateway.log_producer import LogProducer, RefusedRecordError
from pipeline.gateway.problems import (
    CONFLICT,
    IN_DOUBT,
    LOG_UNAVAILABLE,
    NOT_FOUND,
    OVERLOADED,
    REJECTED,
    TOO_LARGE,
    Problem,
)
from pipeline.gateway.score_search import ScoreSearch
from pipeline.gateway.waiting import Waiter, Waiters
from pipeline.gateway.withdrawals import Withdrawals
from pipeline.kafka.log_reader import HeldBackError
from pipeline.kafka.polls import LogUnavailableError
from pipeline.messages.decoding import NOT_JSON
from pipeline.messages.replies import (
    ANSWERED,
    CLAIMED,
    DUPLICATE,
    REPLY_HEADER,
    Reply,
    StoredAnswer,
)
from pipeline.messages.replies import REJECTED as REJECTED_KIND
from pipeline.messages.trace_context import Headers
from pipeline.settings import Settings
from pipeline.storage.answer_store import AnswerStore
from pipeline.storage.client import StoreUnavailableError

SLOW_POLL_SECONDS = 0.25
"""Time between two looks at the key of a record that this gateway produced: replies come first."""

FAST_POLL_SECONDS = (0.005, 0.1)
"""First and longest time between two looks at a key whose reply goes to another gateway."""

CLOCK_TOLERANCE_MS = 5_000
"""Difference between the clocks of two gateways."""

IN_LOG_PAUSES_SECONDS = (0.02, 0.1, 0.4, 0.5)
"""Pauses between looks for a record that another gateway or a worker is producing."""

KNOWN_IN_LOG_MAX = 10_000
"""Most transactions that are remembered to be in the log, so that it is read for them once."""

Source = Literal["produced", "waited", "repeated"]


@dataclass(frozen=True)
class Scored:
    """A score, byte for byte as the scores topic has it."""

    value: bytes
    source: Source


@dataclass(frozen=True)
class Pending:
    """The transaction is in the log, and its score is not there within the wait."""

    transaction_id: str


Outcome = Scored | Pending


@dataclass
class _Ticket:
    """A transaction that this gateway works on.

    Attributes:
        claim: the claim that stands; None once somebody else's value was found.
        found: what stood at the key before.
        delivery: the record's delivery, if this gateway produced it.
        trace: trace context for the record.
    """

    incoming: Incoming
    claim: StoredAnswer
    found: StoredAnswer | None = None
    delivery: asyncio.Task[int] | None = None
    source: Source = "produced"
    trace: Headers = ()


class ScoreService:
    """Scores of transactions.

    Args:
        settings: names and limits.
        gateway_id: this gateway's; workers answer to it.
        answers: the answer keys.
        producer: of the transactions.
        search: reads scores and transactions from the log.
        waiters: those who wait for replies.
        metrics: monitoring.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self,
        settings: Settings,
        gateway_id: str,
        answers: AnswerStore,
        producer: LogProducer,
        search: ScoreSearch,
        waiters: Waiters,
        metrics: GatewayMetrics,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._topic = settings.topic("transactions")
        self._headers = ((REPLY_HEADER, gateway_id.encode()),)
        self._produce_seconds = settings.gateway_produce_seconds
        self._claim_ms = round(settings.gateway_produce_seconds * 2000) + CLOCK_TOLERANCE_MS
        self._most = settings.gateway_max_transactions
        self._answers = answers
        self._producer = producer
        self._search = search
        self._waiters = waiters
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._in_log: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._withdrawals = Withdrawals(answers, self._claim_ms / 1000, metrics)
        self.working = 0

    async def stop(self) -> None:
        """End what runs in the background."""
        await self._withdrawals.stop()

    async def score(self, incoming: Incoming, wait_seconds: float, trace: Headers = ()) -> Outcome:
        """Score one transaction; see :meth:`score_all`.

        Raises:
            Problem: it has no score and will get none, or the services do not answer.
        """
        (outcome,) = await self.score_all([incoming], wait_seconds, trace)
        if isinstance(outcome, Problem):
            raise outcome
        return outcome

    async def score_all(
        self, batch: Sequence[Incoming], wait_seconds: float, trace: Headers = ()
    ) -> list[Outcome | Problem]:
        """Score transactions. They are produced in this order.

        Args:
            wait_seconds: longest wait for all of them together.
            trace: trace context for their records.

        Returns:
            an outcome for each, or its problem.

        Raises:
            Problem: none of them was done: too many wait here, or Redis does not answer.
        """
        if self.working + len(batch) > self._most:
            raise Problem(OVERLOADED)
        deadline = asyncio.get_running_loop().time() + wait_seconds
        self.working += len(batch)
        try:
            now_ms = self._clock_ms()
            tickets = [
                _Ticket(one, StoredAnswer("P", one.content, now_ms), trace=trace) for one in batch
            ]
            await self._claim(tickets)
            if len(tickets) == 1:
                return [await self._finish(tickets[0], deadline)]
            # Records enter the producer in the order of the batch: each send starts in turn.
            return list(await asyncio.gather(*(self._finish(t, deadline) for t in tickets)))
        finally:
            self.working -= len(batch)

    async def look_up(
        self, partition: int, transaction_id: str, answer: StoredAnswer, wait_seconds: float
    ) -> Outcome:
        """Return the outcome of a transaction whose key was found; wait for what is not there yet.

        Raises:
            Problem: it was rejected, its score is gone, its gateway died before it produced the
                record, or the services do not answer.
        """
        deadline = asyncio.get_running_loop().time() + wait_seconds
        pause, longest = FAST_POLL_SECONDS
        while True:
            outcome = await self._shown(partition, transaction_id, answer)
            if outcome is not None:
                return outcome
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return await self._still_claimed(partition, transaction_id, answer)
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, longest)
            found = await self._answers.read(partition, transaction_id)
            if found is None:
                raise Problem(NOT_FOUND)
            answer = found

    async def _still_claimed(
        self, partition: int, transaction_id: str, claim: StoredAnswer
    ) -> Pending:
        """Tell a transaction that waits in the log from a claim that its gateway left behind.

        Raises:
            Problem: the claim is old, and the log does not have the transaction.
        """
        is_old = claim.kind == "P" and self._clock_ms() - claim.number > self._claim_ms
        if is_old and not await self._is_in_log(partition, None, transaction_id, claim):
            raise Problem(NOT_FOUND)
        return Pending(transaction_id)

    async def _claim(self, tickets: Sequence[_Ticket]) -> None:
        """Claim the transactions, and note what stood there before.

        Raises:
            StoreUnavailableError: Redis does not answer. Claims that stand will be withdrawn.
        """
        claims = [(t.incoming.partition, t.incoming.transaction_id, t.claim) for t in tickets]
        try:
            before = await self._answers.claim(claims)
        except (StoreUnavailableError, asyncio.CancelledError):
            self._withdrawals.add(claims)
            raise
        for ticket, found in zip(tickets, before, strict=True):
            ticket.found = found

    # one transaction ---------------------------------------------------------------------

    async def _finish(self, ticket: _Ticket, deadline: float) -> Outcome | Problem:
        """Produce a transaction, or find out who did, and wait for its answer."""
        incoming = ticket.incoming
        waiter = Waiter(incoming.partition, incoming.content)
        with self._waiters.waiting(incoming.transaction_id, waiter):
            try:
                if ticket.found is None:
                    await self._produce(ticket)
                else:
                    ticket.source = "repeated"
                    await self._join(ticket)
                    if ticket.found is not None:
                        place = incoming.partition, incoming.transaction_id
                        outcome = await self._shown(*place, ticket.found)
                        if outcome is not None:
                            return outcome
                return await self._wait(ticket, waiter, deadline)
            except Problem as problem:
                return problem
            except LogUnavailableError:
                return Problem(LOG_UNAVAILABLE)

    async def _produce(self, ticket: _Ticket) -> None:
        """Produce the record of a transaction whose claim is this gateway's.

        Raises:
            Problem: the broker refuses the record, or cannot be reached; nothing was produced.
        """
        incoming = ticket.incoming
        try:
            ticket.delivery = await self._producer.send(
                self._topic,
                incoming.key,
                incoming.value,
                incoming.partition,
                (*self._headers, *ticket.trace),
            )
        except (RefusedRecordError, LogUnavailableError) as error:
            raise await self._not_produced(ticket, error) from error

    async def _not_produced(self, ticket: _Ticket, error: Exception) -> Problem:
        """Release the claim of a record that is not in the log, and make the problem."""
        await self._release(ticket)
        if isinstance(error, RefusedRecordError) and error.is_too_large:
            return Problem(TOO_LARGE, "the broker takes no record of this size")
        return Problem(LOG_UNAVAILABLE)

    async def _release(self, ticket: _Ticket) -> None:
        """Delete this gateway's claim, unless something else stands there."""
        incoming = ticket.incoming
        try:
            await self._answers.replace(
                incoming.partition, incoming.transaction_id, ticket.claim, None
            )
        except StoreUnavailableError:
            self._metrics.claims_left.inc()  # the next request takes it over after a while

    async def _join(self, ticket: _Ticket) -> None:
        """Find out whether a transaction that was claimed before is the same, and in the log.

        An old claim may be of a gateway that died before it produced. Then this one produces.

        Raises:
            Problem: another content stands under the id.
            LogUnavailableError: the log cannot be read.
        """
        incoming = ticket.incoming
        while True:
            found = ticket.found
            assert found is not None
            if found.content != incoming.content:
                raise Problem(CONFLICT, "another body came under this transaction_id")
            if found.kind != "P" or self._clock_ms() - found.number <= self._claim_ms:
                return
            if await self._is_in_log(
                incoming.partition, incoming.key, incoming.transaction_id, found
            ):
                return
            renewed = StoredAnswer("P", incoming.content, self._clock_ms())
            place = incoming.partition, incoming.transaction_id
            try:
                is_taken_over = await self._answers.replace(*place, found, renewed)
            except (StoreUnavailableError, asyncio.CancelledError):
                self._withdrawals.add([(*place, renewed)])
                raise
            if is_taken_over:
                self._metrics.claims_taken_over.inc()
                ticket.claim, ticket.found = renewed, None
                ticket.source = "produced"
                await self._produce(ticket)
                return
            ticket.found = await self._answers.read(*place)
            if ticket.found is None and await self._begin_again(ticket):
                return

    async def _begin_again(self, ticket: _Ticket) -> bool:
        """Claim a transaction whose gateway gave it up, and produce it.

        Returns:
            whether the claim stands. Else another gateway was faster, and the ticket has its claim.

        Raises:
            Problem: another content stands under the id, or the broker cannot be reached.
            StoreUnavailableError: Redis does not answer.
        """
        ticket.claim = StoredAnswer("P", ticket.incoming.content, self._clock_ms())
        await self._claim([ticket])
        if ticket.found is None:
            ticket.source = "produced"
            await self._produce(ticket)
            return True
        if ticket.found.content != ticket.incoming.content:
            raise Problem(CONFLICT, "another body came under this transaction_id")
        return False

    async def _is_in_log(
        self, partition: int, key: bytes | None, transaction_id: str, claim: StoredAnswer
    ) -> bool:
        """Tell whether the log has a claimed transaction; a key of None is any account's."""
        place = partition, claim.content
        if place in self._in_log:
            return True
        since_ms = claim.number - CLOCK_TOLERANCE_MS
        found = await self._search.has_transaction(partition, key, transaction_id, since_ms)
        if found:
            self._in_log[place] = None
            if len(self._in_log) > KNOWN_IN_LOG_MAX:
                self._in_log.popitem(last=False)
        return found

    # waiting -----------------------------------------------------------------------------

    async def _wait(self, ticket: _Ticket, waiter: Waiter, deadline: float) -> Outcome:
        """Wait for the answer, by its reply or its key.

        Raises:
            Problem: it was rejected, or the record was refused.
            LogUnavailableError: the broker did not confirm the record.
        """
        loop = asyncio.get_running_loop()
        pause, longest = FAST_POLL_SECONDS
        if ticket.delivery is not None:
            pause = longest = SLOW_POLL_SECONDS
            ticket.delivery.add_done_callback(lambda task: _wake_on_error(task, waiter))
        while True:
            await waiter.wait(min(pause, deadline - loop.time()))
            pause = min(2 * pause, longest)
            reply = waiter.reply
            if reply is not None and reply.kind != DUPLICATE:
                return self._replied(reply, ticket)
            await self._raise_failed_delivery(ticket)
            outcome = await self._by_key(ticket)
            if outcome is not None:
                return outcome
            if reply is not None:
                return await self._duplicate(ticket)
            if loop.time() >= deadline:
                break
        await self._until_in_log(ticket)
        return Pending(ticket.incoming.transaction_id)

    async def _until_in_log(self, ticket: _Ticket) -> None:
        """Wait until the log has the record: only that is accepted.

        Raises:
            Problem: the record was refused, or another gateway's is not in the log.
            LogUnavailableError: the broker did not confirm the record, or cannot be read.
        """
        incoming = ticket.incoming
        if ticket.delivery is not None:
            try:
                await asyncio.shield(ticket.delivery)
            except RefusedRecordError as error:
                raise await self._not_produced(ticket, error) from error
            return
        assert ticket.found is not None
        if ticket.found.kind != "P":
            return
        for pause in (*IN_LOG_PAUSES_SECONDS, None):
            if await self._is_in_log(
                incoming.partition, incoming.key, incoming.transaction_id, ticket.found
            ):
                return
            if pause is not None:
                await asyncio.sleep(pause)
        raise Problem(IN_DOUBT)

    async def _by_key(self, ticket: _Ticket) -> Outcome | None:
        """Return what the answer key says; None while it says nothing, or Redis is away.

        Raises:
            Problem, LogUnavailableError: see :meth:`_shown`.
        """
        incoming = ticket.incoming
        place = incoming.partition, incoming.transaction_id
        try:
            answer = await self._answers.read(*place)
            if answer is None and ticket.delivery is None:
                await self._begin_again(ticket)
        except StoreUnavailableError:
            self._metrics.unread_keys.inc()  # wait on: a worker answers once Redis is back
            return None
        if answer is None or answer.kind == "P":
            return None
        if answer.content != incoming.content:
            raise Problem(CONFLICT, "another body came under this transaction_id")
        return await self._shown(*place, answer, ticket.source)

    async def _raise_failed_delivery(self, ticket: _Ticket) -> None:
        delivery = ticket.delivery
        if delivery is None or not delivery.done():
            return
        error = delivery.exception()
        if isinstance(error, RefusedRecordError):
            raise await self._not_produced(ticket, error) from error
        if error is not None:
            raise error

    def _replied(self, reply: Reply, ticket: _Ticket) -> Outcome:
        if reply.kind == ANSWERED:
            return Scored(reply.value, ticket.source)
        raise rejected(reply.value.decode(errors="replace"))

    async def _shown(
        self,
        partition: int,
        transaction_id: str,
        answer: StoredAnswer,
        source: Source = "repeated",
    ) -> Outcome | None:
        """Return what an answer key says; None for a claim, and for a score not shown yet.

        Raises:
            Problem: the transaction was rejected, or the log no longer has its score.
            LogUnavailableError: the log cannot be read.
        """
        if answer.kind == REJECTED_KIND:
            raise rejected(answer.reason)
        if answer.kind == CLAIMED:
            return None
        try:
            value = await self._search.score_at(partition, answer.number, transaction_id)
        except HeldBackError:
            return None
        if value is None:
            raise Problem(CONFLICT, "the transaction was scored, and the log has its score no more")
        return Scored(value, source)

    async def _duplicate(self, ticket: _Ticket) -> Outcome:
        """Find the score of a transaction that its account had before, without an answer key.

        Raises:
            Problem: the recent scores do not have it.
        """
        incoming = ticket.incoming
        place = incoming.partition, incoming.transaction_id
        for pause in (*IN_LOG_PAUSES_SECONDS, None):
            found = await self._search.recent_score([incoming.partition], incoming.transaction_id)
            if found is not None or pause is None:
                break
            await asyncio.sleep(pause)  # brokers may show it a moment after its commit
        if found is None:
            await self._release(ticket)
            raise Problem(CONFLICT, "the account had this transaction before; its score is not"
                          " among the recent ones")  # fmt: skip
        _, offset, value = found
        answer = StoredAnswer("A", incoming.content, offset)
        await self._answers.replace(*place, ticket.claim, answer)
        return Scored(value, "repeated")


def rejected(reason: str) -> Problem:
    """Make the problem for a transaction that workers rejected."""
    return Problem(REJECTED, extensions={"reason": reason})


def account_of(score: bytes) -> str:
    """Return the account of a score's record; an empty text for another record."""
    try:
        found = decode_any(score)
    except NOT_JSON:
        return ""
    account = found.get("account_id", "") if isinstance(found, dict) else ""
    return account if isinstance(account, str) else ""


def _wake_on_error(task: asyncio.Task[int], waiter: Waiter) -> None:
    if task.cancelled() or task.exception() is not None:
        waiter.wake(None)
