"""The cost of ``exactly_once``, in turn with ``at_least_once`` on the same services."""

from __future__ import annotations

from statistics import fmean

import numpy as np

from benchmarks.bench import RECUR, Bench
from benchmarks.latency import QUANTILES, RATES, measure
from benchmarks.throughput import Case, drain

MODES = ("at_least_once", "exactly_once")


async def transactional(bench: Bench, transactions: int, seconds: float) -> None:
    """Measure throughput and latencies of both guarantees."""
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    latencies: dict[str, list[dict[tuple[int, float], float]]] = {mode: [] for mode in MODES}
    for mode in (*MODES, *reversed(MODES)):  # this order cancels a drift of the machine
        changes = {"processing_guarantee": mode}
        case = Case(mode, RECUR, changes, live=True)
        rates[mode].append((await drain(bench, case, bench.settings(**changes), transactions)).rate)
        _, runs = await measure(bench, RECUR, bench.settings(**changes), seconds)
        latencies[mode].append(
            {
                (rate, share): float(np.quantile(run.times.latency_ms, share))
                for rate, run in runs.items()
                for share in QUANTILES
            }
        )
    plain, exactly = (fmean(rates[mode]) for mode in MODES)
    bench.results.add(
        "throughput, at_least_once and exactly_once",
        f"{plain:,.0f}, {exactly:,.0f} transactions/s ({exactly / plain:.0%})",
    )
    for rate in RATES:
        for share in QUANTILES:
            key = (rate, share)
            values = [fmean(f.get(key, float("nan")) for f in latencies[mode]) for mode in MODES]
            bench.results.add(
                f"latency p{share * 100:.0f} at {rate:,}/s, at_least_once and exactly_once",
                "{:.1f}, {:.1f} ms".format(*values),
            )
