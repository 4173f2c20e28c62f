"""Stage of the demo: feed transactions, watch the workers, and count the scores."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo.gauges import Latency, Rates
from pipeline.demo.http_traffic import VISITOR_PREFIX, HttpTraffic, LivePart, divide
from pipeline.demo.labels import DelayedLabels
from pipeline.demo.view import ALERT_LINES_MAX, AlertLine, Display, Scene, clock, milliseconds
from pipeline.errors import ServiceError
from pipeline.local.embedded import Services
from pipeline.local.worker_metrics import LATENCY, PARTITIONS, TRANSACTIONS
from pipeline.local.workers import LocalGateway, WorkerProcess
from pipeline.messages.scores import decode_alert
from pipeline.replay.producer import Block, Feed, ahead
from pipeline.replay.score_counter import ScoreCounter, TopicReader
from pipeline.replay.simulated import SimulatedTransactions

STALL_SECONDS = 60.0
"""Time without a new score after which the rest counts as lost."""

FRAME_SECONDS = 0.25
_VISITOR_MARK = f'"{VISITOR_PREFIX}'.encode()
SCRAPE_SECONDS = 1.0
SCRAPED = (f"{LATENCY}_bucket", TRANSACTIONS, PARTITIONS)
"""Samples that a scrape reads: a whole page takes a worker and the demo some milliseconds each."""


@dataclass(slots=True)
class Phase:
    """A phase of the demo: its transactions and their results."""

    name: str
    transactions: SimulatedTransactions
    counter: ScoreCounter
    sent_before: int
    scored_before: int
    rejected_before: int
    read_along: bool = False
    """Whether scores are read as they come. Otherwise they are read last, to spare the cores."""
    warm: bool = False
    endless: bool = False
    """Whether the phase repeats until Ctrl-C."""
    explained: str = ""
    rejected: int = 0
    alerted: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    """Transactions with an alert, as bool[n]."""
    p50_seconds: float | None = None
    p99_seconds: float | None = None
    """Quantiles of the latency, of the live phase only."""
    started: float = field(default_factory=time.monotonic)
    started_ms: float = field(default_factory=lambda: time.time() * 1000)

    def __post_init__(self) -> None:
        self.alerted = np.zeros(len(self.transactions), np.bool_)

    @property
    def seconds(self) -> float:
        """Seconds from the first sent transaction to the last published score."""
        return max(0.001, (self.counter.last_ms - self.started_ms) / 1000)

    @property
    def per_second(self) -> float:
        """Scored transactions in a second."""
        return self.counter.scored / self.seconds

    def faults(self) -> list[str]:
        """Describe each violation of the demo's promises."""
        counter = self.counter
        lost = counter.missing - self.rejected
        without_alert = 0 if self.warm else int((counter.flagged & ~self.alerted).sum())
        found = [
            (lost, "never scored"),
            (self.rejected, "rejected"),
            (counter.duplicates, "scored more than once"),
            (counter.contradictions, "given two different scores"),
            (counter.unknown, "scored again later"),
            (without_alert, "declined or reviewed without an alert"),
        ]
        return [f"{count:,} {what} ({self.name})" for count, what in found if count > 0]


class Stage:
    """Feeder of the phases that shows their progress and counts their results.

    Args:
        gateway: process that the requests go to.
        http: client that sends them.
        labels: sender of the delayed labels.
        scores: reader of the scores, started before the first transaction.
        alerts: reader of the alerts, started like that of the scores.
        dead_letters: reader of the dead letters, started like that of the scores.

    Attributes:
        faults: descriptions of all faults so far.
    """

    def __init__(
        self,
        display: Display,
        services: Services,
        workers: Sequence[WorkerProcess],
        gateway: LocalGateway,
        http: HttpTraffic,
        feed: Feed,
        labels: DelayedLabels,
        scores: TopicReader,
        alerts: TopicReader,
        dead_letters: TopicReader,
    ) -> None:
        self.faults: list[str] = []
        self._display = display
        self._services = services
        self._workers = workers
        self._gateway = gateway
        self._gateway_died = False
        self.http = http
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
        self._published = self._rejected = self._visitors = 0
        self._started = time.monotonic()
        self._scene = Scene(addresses=[worker.address for worker in workers])

    # phases

    async def histories(self, transactions: SimulatedTransactions, days: int) -> Phase:
        """Send simulated days that give the accounts a past."""
        phase = self._phase("histories", transactions, warm=True)
        phase.explained = f"{days} days of payments give the accounts a past"
        await self._perform(phase, transactions.blocks())
        self._display.done(
            f"histories, {days} days",
            f"{len(transactions):,} transactions in {phase.seconds:.1f} s",
        )
        return phase

    async def live(
        self, transactions: SimulatedTransactions, rate: float, *, endless: bool = False
    ) -> Phase:
        """Send transactions at a steady rate; ``endless``: the phase repeats until Ctrl-C."""
        phase = self._phase("live", transactions, read_along=True)
        phase.endless = endless
        times = transactions.columns.timestamp_ms
        minutes = (times[-1] - times[0]) / 60_000 / (len(transactions) / rate)
        phase.explained = f"one second here is {minutes:,.0f} simulated minutes"
        await self._scrape()
        self._latency.reset()
        accounts = transactions.columns.account
        part = await asyncio.to_thread(divide, list(transactions.blocks()), accounts, rate)
        await self._perform(phase, [part.fed], part)
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
        """Send transactions at full speed, from encoded blocks if there are any."""
        phase = self._phase("burst", transactions)
        phase.explained = "the workers' full speed"
        await self._perform(phase, transactions.blocks() if blocks is None else blocks)
        self._display.done(
            "burst",
            f"{len(transactions):,} transactions in {phase.seconds:.1f} s:"
            f" {phase.per_second:,.0f}/s",
        )
        return phase

    def progress_text(self) -> str:
        """Make a line with the counts so far, for a demo that is stopped."""
        seconds = time.monotonic() - self._started
        return (
            f"stopped after {clock(seconds)}: {self._acked():,} sent,"
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
        self._rates = Rates(self._acked(), self._published)
        self.labels.add(transactions)
        return Phase(
            name,
            transactions,
            ScoreCounter(len(transactions), transactions.index_of),
            self._sent(),
            self._published,
            self._rejected,
            read_along,
            warm,
        )

    async def _perform(
        self, phase: Phase, blocks: Iterable[Block], part: LivePart | None = None
    ) -> None:
        if not phase.read_along:  # early labels are fine: each has the time from which it counts
            await self.labels.send_until(int(phase.transactions.columns.timestamp_ms[-1]))
        sending = [self._feed.run(ahead(blocks), warm=phase.warm, history=True)]
        if part is not None:
            sending.append(self.http.run(part))
        feeding = asyncio.ensure_future(_all(sending))
        try:
            await self._wait_until_scored(phase, feeding)
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
        await self._wait_until_counted(phase)
        for fault in phase.faults():
            self._display.note(fault, bad=True)
            self.faults.append(fault)

    async def _wait_until_scored(self, phase: Phase, feeding: asyncio.Future[None]) -> None:
        """Watch until each sent transaction has a score or a dead letter."""
        moved_at, before = time.monotonic(), -1
        while True:
            await asyncio.sleep(FRAME_SECONDS)
            await self._update(phase)
            if feeding.done():
                feeding.result()
                if self._waiting() <= 0:
                    return
            if self._published != before or not feeding.done():
                moved_at, before = time.monotonic(), self._published
            if time.monotonic() - moved_at > STALL_SECONDS:
                return

    async def _wait_until_counted(self, phase: Phase) -> None:
        """Read every score, and wait for missing ones."""
        name = phase.name if phase.read_along else "checking"
        stalled_at = time.monotonic() + (STALL_SECONDS if self._waiting() <= 0 else 0.0)
        while True:
            shown_at = time.monotonic()
            async for records in self._scores.to_end():
                self._add(phase, records)
                if time.monotonic() - shown_at > FRAME_SECONDS:
                    shown_at = time.monotonic()
                    self._show_scene(phase, name, phase.counter.scored, "scores counted")
            async for records in self._alerts.to_end():
                self._add_alerts(phase, records)
            await self._update(phase)
            if phase.counter.missing <= phase.rejected or time.monotonic() > stalled_at:
                return
            await asyncio.sleep(FRAME_SECONDS)

    async def _update(self, phase: Phase) -> None:
        """Read the new results and show them."""
        self._check_processes()
        self._published = await self._scores.published() - self._visitors
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
        scene.rate_in, scene.rate_out = self._rates.add(self._acked(), self._published)
        scored = self._published - phase.scored_before
        self._show_scene(phase, phase.name, scored, "scored")

    def _event_ms(self, phase: Phase) -> int:
        """Find the time of the newest sent transaction, in simulated milliseconds."""
        sent = self._sent() - phase.sent_before
        last = len(phase.transactions) - 1
        return int(phase.transactions.columns.timestamp_ms[min(sent, last)])

    def _waiting(self) -> int:
        """Count the sent transactions without a score."""
        return self._sent() - self._published - self._rejected

    def _sent(self) -> int:
        """Count the sent transactions; a request counts once the gateway has answered."""
        return self._feed.count.sent + self.http.accepted

    def _acked(self) -> int:
        return self._feed.count.acked + self.http.accepted

    def _check_processes(self) -> None:
        for service in (self._services.kafka, self._services.redis):
            if service is not None:
                _ = service.pid  # raises an error with its log if the service has ended
        self._check_workers()
        if self._gateway.death is not None and not self._gateway_died:
            self._gateway_died = True
            self._display.note(f"the gateway {self._gateway.death}; the feed takes over")
            if not self._gateway.killed:
                self.faults.append(f"the gateway {self._gateway.death}")

    def _check_workers(self) -> None:
        for worker in self._workers:
            if worker.death is None or worker.number in self._dead:
                continue
            self._dead.add(worker.number)
            if len(self._dead) == len(self._workers):
                raise ServiceError(
                    f"{worker.name} {worker.death}, and no other worker runs; the end of its log:\n"
                    + worker.log_tail()
                )
            self._display.note(f"{worker.name} {worker.death}; the other workers take over")
            if not worker.killed:
                self.faults.append(f"{worker.name} {worker.death}")

    async def _scrape(self) -> None:
        self._last_scrape = time.monotonic()
        await asyncio.gather(
            *(
                worker.refresh(SCRAPED)
                for worker in self._workers
                if worker.number not in self._dead
            )
        )
        self._latency.record()

    def _add(self, phase: Phase, records: list[Any]) -> None:
        ours = [record for record in records if _VISITOR_MARK not in record.value]
        self._visitors += len(records) - len(ours)
        fresh = phase.counter.add(ours)
        if phase.warm:
            return
        fraud = phase.transactions.columns.scenario[fresh] > 0
        flagged = phase.counter.decisions[fresh] > 0
        self._scene.caught += int((fraud & flagged).sum())
        self._scene.missed += int((fraud & ~flagged).sum())
        self._scene.false_alerts += int((flagged & ~fraud).sum())

    def _add_alerts(self, phase: Phase, records: list[Any]) -> None:
        self._alerts_read += len(records)
        alerts = [
            alert
            for alert in (decode_alert(record.value) for record in records)
            if not alert.transaction_id.startswith(VISITOR_PREFIX)
        ]
        index = phase.transactions.index_of([alert.transaction_id for alert in alerts])
        for alert, place in zip(alerts, index.tolist(), strict=True):
            if place < 0:
                continue  # a duplicate from the phase before
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

    def _show_scene(self, phase: Phase, name: str, done: int, unit: str) -> None:
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
            scene.p50_seconds = scene.p99_seconds = None  # in a flood it would be the waiting time
        else:
            scene.p50_seconds, scene.p99_seconds = map(self._latency.recent, (0.5, 0.99))
        scene.event_ms = self._event_ms(phase)
        scene.alerts = self._alerts_read
        scene.rates_out, scene.recent = self._rates.curve, self._recent
        names = [worker.name for worker in self._workers if worker.number not in self._dead]
        scene.workers = [*names, *([] if self._gateway_died else [self._gateway.name])]
        figures = self.http.figures(recent=True)
        scene.http_requests, scene.http_errors = figures.requests, figures.errors
        scene.http_p50_seconds, scene.http_p99_seconds = figures.p50_seconds, figures.p99_seconds
        self._display.show(scene)


async def _all(sending: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first error cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in sending]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
