"""Rates and latencies of the last seconds, for the demo's view."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from pipeline.local.worker_metrics import LATENCY, buckets, quantile
from pipeline.local.workers import WorkerProcess

RATE_WINDOW_SECONDS = 2.0
LATENCY_WINDOW_SECONDS = 10.0
CURVE_POINTS = 120

_RATE_SPAN_MIN_SECONDS = 0.25  # shorter spans give no useful rate


class Rates:
    """Rates over the last seconds, from the growing counts of sent and scored."""

    def __init__(self, sent: int, scored: int) -> None:
        self._counts = deque([(time.monotonic(), sent, scored)])
        self.curve: deque[float] = deque(maxlen=CURVE_POINTS)

    def add(self, sent: int, scored: int) -> tuple[float, float]:
        """Add counts and return transactions/s in and out."""
        now = time.monotonic()
        self._counts.append((now, sent, scored))
        while len(self._counts) > 2 and self._counts[1][0] <= now - RATE_WINDOW_SECONDS:
            self._counts.popleft()
        then, sent_then, scored_then = self._counts[0]
        seconds = max(_RATE_SPAN_MIN_SECONDS, now - then)
        rates = (sent - sent_then) / seconds, (scored - scored_then) / seconds
        self.curve.append(rates[1])
        return rates


class Latency:
    """Sum of the workers' latency histograms since the last reset."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self._workers = workers
        self._start: dict[float, float] = {}
        self._window: deque[tuple[float, dict[float, float]]] = deque()

    def reset(self) -> None:
        """Forget all earlier observations."""
        self._start = self._now()
        self._window.clear()

    def record(self) -> None:
        """Record the present counts, for :meth:`recent`."""
        now = time.monotonic()
        self._window.append((now, self._now()))
        while len(self._window) > 2 and self._window[1][0] <= now - LATENCY_WINDOW_SECONDS:
            self._window.popleft()

    def recent(self, share: float) -> float | None:
        """Estimate a quantile of the last seconds' latencies, in seconds."""
        then = self._window[0][1] if len(self._window) > 1 else self._start
        return self._quantile(then, share)

    def overall(self, share: float) -> float | None:
        """Estimate a quantile of all latencies since :meth:`reset`, in seconds."""
        return self._quantile(self._start, share)

    def _quantile(self, since: Mapping[float, float], share: float) -> float | None:
        now = self._now()
        return quantile({bound: now[bound] - since.get(bound, 0.0) for bound in now}, share)

    def _now(self) -> dict[float, float]:
        total: dict[float, float] = {}
        for worker in self._workers:
            for bound, count in buckets(worker.samples, LATENCY).items():
                total[bound] = total.get(bound, 0.0) + count
        return total
