"""What happens on stage in the demo: transactions are fed, watched, and counted."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.gauges import Latency, Rates
from pipeline.demo.labels import LateLabels
from pipeline.demo.view import ALERT_LINES_MAX, AlertLine, Display, Scene, clock, milliseconds
from pipeline.errors import ServiceError
from pipeline.local.services import Services
from pipeline.local.workers import WorkerProcess
from pipeline.messages.scores import decode_alert
from pipeline.replay.producer import Block, Feed, ahead
from pipeline.replay.score_counter import ScoreCounter, TopicReader
from pipeline.replay.simulated import SimulatedTransactions

STALL_SECONDS = 60.0
"""Nothing was scored for so long: the rest counts as lost."""

FRAME_SECONDS = 0.25
SCRAPE_SECONDS = 1.0


@dataclass(slots=True)
class Phase:
    """One part of the demo: what is sent in it and what came of it."""

    name: str
    transactions: SimulatedTransactions
    tally: ScoreCounter
    sent_before: int
    scored_before: int
    rejected_before: int
    read_along: bool = False
    """Scores are read as they come; else after the last one, to leave the cores alone."""
    warm: bool = False
    endless: bool = False
    """One of many, without an end to look forward to."""
    explained: str = ""
    rejected: int = 0
    alerted: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    """bool[n]: an alert came."""
    p50_seconds: float | None = None
    p99_seconds: float | None = None
    """Of its latencies, where it is live."""
    started: float = field(default_factory=time.monotonic)
    started_ms: float = field(default_factory=lambda: time.time() * 1000)

    def __post_init__(self) -> None:
        self.alerted = np.zeros(len(self.transactions), np.bool_)

    @property
    def seconds(self) -> float:
        """From the first transaction sent to the last score published."""
        return max(0.001, (self.tally.last_ms - self.started_ms) / 1000)

    @property
    def per_second(self) -> float:
        """Transactions scored in a second."""
        return self.tally.scored / self.seconds

    def faults(self) -> list[str]:
        """What must not be."""
        tally = self.tally
        lost = tally.missing - self.rejected
        without_alert = 0 if self.warm else int((tally.flagged & ~self.alerted).sum())
        found = [
            (lost, "never scored"),
            (self.rejected, "rejected"),
            (tally.repeated, "scored more than once"),
            (tally.contradictions, "given two different scores"),
            (tally.strangers, "scored again later"),
            (without_alert, "declined or reviewed without an alert"),
        ]
        return [f"{count:,} {what} ({self.name})" for count, what in found if count > 0]


class Show:
    """Feeds one phase after the other, shows it, and counts what came out.

    Args:
        labels: the frauds, known late.
        scores, alerts, dead_letters: readers that start where the demo starts.

    Attributes:
        faults: what went wrong so far, for people.
    """

    def __init__(
        self,
        display: Display,
        services: Services,
        workers: Sequence[WorkerProcess],
        feed: Feed,
        labels: LateLabels,
        scores: TopicReader,
        alerts: TopicReader,
        dead_letters: TopicReader,
    ) -> None:
        self.faults: list[str] = []
        self._display = display
        self._services = services
        self._workers = workers
        self._feed = feed
        self.labels = labels
        self._scores = scores
        self._alerts = alerts
        self._dead_letters = dead_letters
        self._rates = Rates(0, 0)
        self._latency = Latency(workers)
        self._dead: set[int] = set()
        self._recent: deque[AlertLine] = deque(maxlen=ALERT_LINES_MAX)
        self._alerts_read = 0
        self._last_scrape = 0.0
        self._published = self._rejected = 0
        self._started = time.monotonic()
        self._scene = Scene(addresses=[worker.address for worker in workers])

    # phases

    async def histories(self, transactions: SimulatedTransactions, days: int) -> Phase:
        """Give the accounts a past."""
        phase = self._phase("histories", transactions, warm=True)
        phase.explained = f"{days} days of payments, so that the model knows the accounts"
        await self._perform(phase, transactions.blocks())
        self._display.done(
            f"histories, {days} days",
            f"{len(transactions):,} transactions in {phase.seconds:.1f} s",
        )
        return phase

    async def live(
        self, transactions: SimulatedTransactions, rate: float, *, endless: bool = False
    ) -> Phase:
        """Feed at a steady rate; ``endless`` says that this is one chapter of many."""
        phase = self._phase("live", transactions, read_along=True)
        phase.endless = endless
        times = transactions.columns.timestamp_ms
        minutes = (times[-1] - times[0]) / 60_000 / (len(transactions) / rate)
        phase.explained = f"one second here is {minutes:,.0f} minutes there"
        await self._scrape()
        self._latency.begin()
        await self._perform(phase, transactions.blocks(), rate)
        await self._scrape()
        phase.p50_seconds, phase.p99_seconds = (self._latency.overall(q) for q in (0.5, 0.99))
        if not endless:
            self._display.done(
                "live",
                f"{len(transactions):,} transactions at {rate:,.0f}/s,"
                f" p50 {milliseconds(phase.p50_seconds)}, p99 {milliseconds(phase.p99_seconds)}",
            )
        return phase

    async def burst(
        self, transactions: SimulatedTransactions, blocks: Iterable[Block] | None
    ) -> Phase:
        """Feed as fast as it goes; ``blocks`` where they are encoded already."""
        phase = self._phase("burst", transactions)
        phase.explained = "as fast as the workers take them"
        await self._perform(phase, transactions.blocks() if blocks is None else blocks)
        self._display.done(
            "burst",
            f"{len(transactions):,} transactions in {phase.seconds:.1f} s:"
            f" {phase.per_second:,.0f}/s",
        )
        return phase

    def so_far(self) -> str:
        """One line for somebody who does not wait for the end."""
        seconds = time.monotonic() - self._started
        return (
            f"stopped after {clock(seconds)}: {self._feed.count.acked:,} sent,"
            f" {self._published:,} scored, {self._alerts_read:,} alerts"
        )

    # one phase

    def _phase(
        self,
        name: str,
        transactions: SimulatedTransactions,
        *,
        read_along: bool = False,
        warm: bool = False,
    ) -> Phase:
        self._rates = Rates(self._feed.count.acked, self._published)
        self.labels.add(transactions)
        return Phase(
            name,
            transactions,
            ScoreCounter(len(transactions), transactions.index_of),
            self._feed.count.sent,
            self._published,
            self._rejected,
            read_along,
            warm,
        )

    async def _perform(
        self, phase: Phase, blocks: Iterable[Block], rate: float | None = None
    ) -> None:
        if not phase.read_along:  # time flies, and a label says itself from when on it is known
            await self.labels.send_until(int(phase.transactions.columns.timestamp_ms[-1]))
        feed = self._feed.run(ahead(blocks), rate=rate, warm=phase.warm, history=True)
        feeding = asyncio.ensure_future(feed)
        try:
            await self._until_scored(phase, feeding)
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
        await self._until_counted(phase)
        for fault in phase.faults():
            self._display.note(fault, bad=True)
            self.faults.append(fault)

    async def _until_scored(self, phase: Phase, feeding: asyncio.Future[None]) -> None:
        """Watch until as many scores are published as transactions were sent."""
        moved_at, before = time.monotonic(), -1
        while True:
            await asyncio.sleep(FRAME_SECONDS)
            await self._look(phase)
            if feeding.done():
                feeding.result()
                if self._waiting() <= 0:
                    return
            if self._published != before or not feeding.done():
                moved_at, before = time.monotonic(), self._published
            if time.monotonic() - moved_at > STALL_SECONDS:
                return

    async def _until_counted(self, phase: Phase) -> None:
        """Read every score, and wait for those that are still missing."""
        name = phase.name if phase.read_along else "checking"
        stalled_at = time.monotonic() + (STALL_SECONDS if self._waiting() <= 0 else 0.0)
        while True:
            shown_at = time.monotonic()
            async for records in self._scores.to_end():
                self._add(phase, records)
                if time.monotonic() - shown_at > FRAME_SECONDS:
                    shown_at = time.monotonic()
                    self._show(phase, name, phase.tally.scored, "scores counted")
            async for records in self._alerts.to_end():
                self._add_alerts(phase, records)
            await self._look(phase)
            if phase.tally.missing <= phase.rejected or time.monotonic() > stalled_at:
                return
            await asyncio.sleep(FRAME_SECONDS)

    async def _look(self, phase: Phase) -> None:
        """See what came out since the last look, and show it."""
        self._check_processes()
        self._published = await self._scores.published()
        self._rejected += len(await self._dead_letters.read())
        phase.rejected = self._rejected - phase.rejected_before
        if time.monotonic() - self._last_scrape > SCRAPE_SECONDS:
            await self._scrape()
        if phase.read_along:
            await self.labels.send_until(self._event_ms(phase))
        while records := await self._alerts.read():
            self._add_alerts(phase, records)
        while phase.read_along and (records := await self._scores.read()):
            self._add(phase, records)
        scene = self._scene
        scene.rate_in, scene.rate_out = self._rates.add(self._feed.count.acked, self._published)
        scored = self._published - phase.scored_before
        self._show(phase, phase.name, scored, "scored")

    def _event_ms(self, phase: Phase) -> int:
        """How far simulated time has come."""
        sent = self._feed.count.sent - phase.sent_before
        last = len(phase.transactions) - 1
        return int(phase.transactions.columns.timestamp_ms[min(sent, last)])

    def _waiting(self) -> int:
        """Transactions sent that have no score yet."""
        return self._feed.count.sent - self._published - self._rejected

    def _check_processes(self) -> None:
        for service in (self._services.kafka, self._services.redis):
            if service is not None:
                _ = service.pid  # of one that has ended it raises, with the end of its log
        self._check_workers()

    def _check_workers(self) -> None:
        for worker in self._workers:
            if worker.death is None or worker.number in self._dead:
                continue
            self._dead.add(worker.number)
            if len(self._dead) == len(self._workers):
                raise ServiceError(
                    f"{worker.name} {worker.death} and none is left; the end of its log:\n"
                    + worker.log_tail()
                )
            self._display.note(f"{worker.name} {worker.death}; the others take over")
            if not worker.killed:
                self.faults.append(f"{worker.name} {worker.death}")

    async def _scrape(self) -> None:
        self._last_scrape = time.monotonic()
        await asyncio.gather(
            *(worker.refresh() for worker in self._workers if worker.number not in self._dead)
        )
        self._latency.look()

    def _add(self, phase: Phase, records: list[Any]) -> None:
        fresh = phase.tally.add(records)
        if phase.warm:
            return
        fraud = phase.transactions.columns.scenario[fresh] > 0
        flagged = phase.tally.decisions[fresh] > 0
        self._scene.caught += int((fraud & flagged).sum())
        self._scene.missed += int((fraud & ~flagged).sum())
        self._scene.false_alerts += int((flagged & ~fraud).sum())

    def _add_alerts(self, phase: Phase, records: list[Any]) -> None:
        self._alerts_read += len(records)
        alerts = [decode_alert(record.value) for record in records]
        index = phase.transactions.index_of([alert.transaction_id for alert in alerts])
        for alert, place in zip(alerts, index.tolist(), strict=True):
            if place < 0:
                continue  # of the phase before, published again
            phase.alerted[place] = True
            self._recent.appendleft(
                AlertLine(
                    alert.timestamp,
                    alert.account_id,
                    alert.merchant_id,
                    alert.amount,
                    alert.score,
                    alert.decision,
                    int(phase.transactions.columns.scenario[place]),
                )
            )

    def _show(self, phase: Phase, name: str, done: int, unit: str) -> None:
        scene = self._scene
        total = len(phase.transactions)
        scene.phase, scene.explained = name, phase.explained
        scene.done = done / total
        scene.progress = f"{min(done, total):,} of {total:,} {unit}"
        if phase.endless:
            scene.progress = f"for {clock(time.monotonic() - self._started)}"
        scene.waiting = max(0, self._waiting())
        scene.scored = self._published
        scene.shows_alerts = not phase.warm
        if phase.warm:
            scene.p50_seconds = scene.p99_seconds = None  # of a flood it is the time in a queue
        else:
            scene.p50_seconds, scene.p99_seconds = map(self._latency.lately, (0.5, 0.99))
        scene.event_ms = self._event_ms(phase)
        scene.alerts = self._alerts_read
        scene.rates_out, scene.recent = self._rates.curve, self._recent
        scene.workers = [worker.name for worker in self._workers if worker.number not in self._dead]
        self._display.show(scene)
