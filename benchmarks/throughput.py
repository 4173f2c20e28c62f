"""The throughput of one worker that drains a full log, beside the peers' and in turn with them.

Live, a worker loads a merchant once in three hours. A log of weeks is the hardest case: a second
is a simulated day, so almost every transaction loads its merchant again.

With the shipped checkpoint the log begins with a history, which is not measured: an account without
one is unusual, and the worker writes a note for nearly each of its payments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.alert_share import chosen_thresholds
from benchmarks.bench import (
    BYTEWAX,
    BYTEWAX_LARGE,
    FAUST_EVENT,
    FAUST_TAKE,
    LARGE_BATCH_RECORDS,
    QUIX,
    RECUR,
    Bench,
    Steady,
    make_topics,
    published,
    steady,
)
from benchmarks.results import Rounds
from benchmarks.score_times import ends, read_score_times
from benchmarks.traffic import feed
from pipeline.checkpoint import load_checkpoint
from pipeline.scoring.scorer import Scorer
from pipeline.settings import Settings

ACCOUNTS_ONLY = "Recur, account features only"
LIVE = "Recur, shipped checkpoint, live"
WEEKS = "Recur, shipped checkpoint, a log of weeks"
LARGE = f"Recur, account features only, batches of {LARGE_BATCH_RECORDS:,}"
AS_SHIPPED = "Recur, shipped checkpoint and thresholds, live"
NEW_ACCOUNTS = "Recur, shipped checkpoint, live, new accounts"

HISTORY = 2
"""Transactions of the history for each one that is measured: 15 of each account by default."""

SLOW_TRANSACTIONS = {FAUST_EVENT: 4_000, FAUST_TAKE: 20_000}
"""Transactions for those that are too slow for the others' number."""

TARGETS = (
    (ACCOUNTS_ONLY, BYTEWAX, 1.5),
    (LIVE, BYTEWAX, 1.2),
    (WEEKS, BYTEWAX, 1.0),
    (LARGE, BYTEWAX_LARGE, None),
    (ACCOUNTS_ONLY, QUIX, None),
    (ACCOUNTS_ONLY, FAUST_EVENT, 25.0),
    (ACCOUNTS_ONLY, FAUST_TAKE, 8.0),
)
"""Ratios of two contenders, and the least that is wanted."""


@dataclass
class Case:
    """A contender and what it drains; the history comes first and is not measured."""

    name: str
    contender: str
    changes: dict[str, Any]
    live: bool = False
    history: int = 0

    def transactions(self, usual: int) -> int:
        """Choose how many it drains: few if it is slow, more if its batches are large."""
        if self.name in (LARGE, BYTEWAX_LARGE):
            return 2 * usual
        return SLOW_TRANSACTIONS.get(self.name, usual)


async def throughput(bench: Bench, peers: list[str], transactions: int, rounds: int) -> None:
    """Measure transactions/s of Recur and the peers, in turn."""
    live = await sample_thresholds(bench, "live stamps", transactions, live=True, history=True)
    new = await sample_thresholds(bench, "new accounts", transactions, live=True, history=False)
    weeks = await sample_thresholds(bench, "a log of weeks", transactions, live=False, history=True)
    accounts = {"checkpoint": bench.accounts_checkpoint}
    history = HISTORY * transactions
    cases = [
        Case(ACCOUNTS_ONLY, RECUR, accounts),
        *(Case(name, name, {}) for name in (BYTEWAX, QUIX) if name in peers),
        Case(LIVE, RECUR, live, live=True, history=history),
        Case(WEEKS, RECUR, weeks, history=history),
        Case(AS_SHIPPED, RECUR, {}, live=True, history=history),
        Case(NEW_ACCOUNTS, RECUR, new, live=True),
        Case(LARGE, RECUR, {**accounts, "micro_batch_max": LARGE_BATCH_RECORDS}),
        *(Case(name, name, {}) for name in (BYTEWAX_LARGE, *SLOW_TRANSACTIONS) if name in peers),
    ]
    rates, cpu, shares = Rounds(), Rounds(), Rounds()
    for _ in range(rounds):
        for case in cases:
            count = case.transactions(transactions)
            settings = bench.settings(**case.changes)
            found = await drain(bench, case, settings, count)
            rates.add(case.name, found.rate)
            cpu.add(f"{case.name}, CPU in µs", found.cpu_us)
            if case.contender == RECUR:
                alerts = sum((await ends(settings, settings.topic("alerts"))).values())
                shares.add(f"{case.name}, alerts in %", 100 * alerts / count)
    for case in cases:
        share = shares.median(f"{case.name}, alerts in %")
        note = f"; {cpu.median(f'{case.name}, CPU in µs'):.0f} µs of CPU each"
        note += "" if np.isnan(share) else f"; {share:.2g} % alert"
        bench.results.add(
            f"throughput, {case.name}", f"{rates.spread(case.name)} transactions/s{note}"
        )
    for name, other, least in TARGETS:
        if other in peers:
            ratio = rates.ratio(name, other)
            target = "-" if least is None else f"at least {least:g}"
            bench.results.add(
                f"{name} / {other}", f"{ratio:.2f} times", target, ratio >= (least or 0)
            )
    size = Scorer(load_checkpoint(bench.settings()), 1).codec.size_bytes
    bench.results.add("size of a state", f"{size} bytes", "at most 450", size <= 450)


async def drain(bench: Bench, case: Case, settings: Settings, transactions: int) -> Steady:
    """Fill the log, start the contender and measure its rate."""
    await make_topics(settings)
    total = case.history + transactions
    stream = bench.payments(live=case.live, history=case.history)
    await feed(settings, stream, total, rate=None)
    async with bench.run(case.contender, settings) as contender:
        return steady(await published(settings, total, contender), transactions, case.history)


async def sample_thresholds(
    bench: Bench, kind: str, transactions: int, *, live: bool, history: bool
) -> dict[str, Any]:
    """Choose thresholds by the scores of a drain, without those of the history."""
    settings = bench.settings()
    case = Case(kind, RECUR, {}, live, HISTORY * transactions if history else 0)
    await drain(bench, case, settings, transactions)
    begin = dict.fromkeys(range(settings.topic_partitions), 0)
    found = (await read_score_times(settings, begin, begin)).scores
    return chosen_thresholds(kind, found[case.history :])
