"""Guard of a fuzz run: it bounds memory, keeps findings and shows progress."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from tests.fuzz.targets import Target

CORPUS = Path(__file__).parent / "corpus"

SLOW_SECONDS = 5.0
"""Longest time for an input; a slower one is a finding."""

SHOWN_EACH_SECONDS = 5.0

FINDINGS_MAX = 20
"""Number of different findings that ends a run."""

OUTCOMES_MAX = 100_000
"""Largest number of outcomes that a run distinguishes."""


class Guard:
    """Counter of inputs that keeps the ones that find something.

    Args:
        target: the decoder to fuzz.
        inputs: number of inputs in the run.
        found: folder for inputs that find something; None keeps findings in memory only.
        out: stream for progress; None shows no progress.

    Attributes:
        findings: a traceback for each place with a finding.
        outcomes: how often each outcome occurred.
    """

    def __init__(
        self, target: Target, inputs: int, found: Path | None = None, out: TextIO | None = None
    ) -> None:
        self._target = target
        self._inputs = inputs
        self._found = found
        self._out = out
        self._start = self._shown = time.monotonic()
        self._peak_kib = _peak_kib()
        self.count = 0
        self.findings: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()

    def run(self, data: bytes) -> bool:
        """Run an input; return whether its outcome is new."""
        self.count += 1
        begin = time.process_time()  # excludes other processes
        try:
            with bounded_memory(self._target.memory_bytes):
                outcome = self._target.run(data)
        except Exception as error:  # the target catches declared errors
            outcome = self._find(data, error)
        took = time.process_time() - begin
        if took > SLOW_SECONDS:
            self._keep(data, "slow", f"it took {took:.1f} s")
        now = time.monotonic()
        if self._out is not None and now - self._shown > SHOWN_EACH_SECONDS:
            self._shown = now
            self._show(now)
        is_new = outcome not in self.outcomes and len(self.outcomes) < OUTCOMES_MAX
        if is_new or outcome in self.outcomes:
            self.outcomes[outcome] += 1
        return is_new

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its number of inputs or findings."""
        return self.count >= self._inputs or len(self.findings) >= FINDINGS_MAX

    def summary(self) -> str:
        """Summarize inputs, rate, outcomes, memory and findings in one line."""
        seconds = time.monotonic() - self._start
        accepted = sum(n for outcome, n in self.outcomes.items() if "accepted" in outcome)
        return (
            f"{self._target.name}: {self.count:,} inputs in {seconds:.0f} s"
            f" ({self.count / max(seconds, 1e-9):,.0f}/s), {accepted:,} accepted,"
            f" {len(self.outcomes)} outcomes, memory grew by {self.growth_mib:.0f} MiB,"
            f" {len(self.findings)} findings"
        )

    def end(self) -> NoReturn:
        """Print the summary and exit with 0, or 1 if there are findings."""
        print(self.summary(), file=self._out, flush=True)
        os._exit(bool(self.findings))

    @property
    def growth_mib(self) -> float:
        """Growth of the process's peak memory since the start."""
        return (_peak_kib() - self._peak_kib) / 1024

    def _find(self, data: bytes, error: Exception) -> str:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        self._keep(data, place, traceback.format_exc())
        return place

    def _keep(self, data: bytes, place: str, text: str) -> None:
        if place in self.findings:
            return
        self.findings[place] = text
        if self._found is not None:
            folder = self._found / self._target.name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / hashlib.sha256(data).hexdigest()[:12]
            path.write_bytes(data)
            print(f"{self._target.name}: {place}, kept as {path}\n{text}", file=self._out)

    def _show(self, now: float) -> None:
        rate = self.count / (now - self._start)
        left = (self._inputs - self.count) / rate
        print(
            f"{self._target.name}: {self.count:,} of {self._inputs:,}, {rate:,.0f}/s,"
            f" {left:.0f} s left, {len(self.outcomes)} outcomes, {len(self.findings)} findings",
            file=self._out,
            flush=True,
        )


@contextmanager
def bounded_memory(more_bytes: int) -> Iterator[None]:
    """Limit the growth of the address space within the block; larger allocations fail.

    Only Linux reports the size of the address space. Other systems have no limit.
    """
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as sizes:
        pages = int(sizes.read(64).split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_kib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "linux" else peak // 1024


def corpus(target: Target) -> list[bytes]:
    """Return the inputs that once found something."""
    return [path.read_bytes() for path in sorted((CORPUS / target.name).glob("*"))]
