"""Runs inputs one by one: what it finds is kept, memory is bounded, progress is shown."""

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
"""An input that takes longer is a finding."""

SHOWN_EACH_SECONDS = 5.0

FINDINGS_MAX = 20
"""So many different findings are enough for one run."""

OUTCOMES_MAX = 100_000
"""So many kinds of outcome are told apart."""


class Guard:
    """Counts inputs and keeps those that find something.

    Args:
        target: what is fuzzed.
        inputs: how many there will be.
        found: folder for what finds something; None keeps it in memory only.
        out: where progress goes, if anywhere.

    Attributes:
        findings: a traceback for each place where something was found.
        outcomes: how often what came of an input.
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
        """Run an input; whether what came of it is new."""
        self.count += 1
        begin = time.process_time()  # not of what runs beside it
        try:
            with bounded_memory(self._target.memory_bytes):
                outcome = self._target.run(data)
        except Exception as error:  # whatever is not declared
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
        """Whether there are inputs enough, or findings."""
        return self.count >= self._inputs or len(self.findings) >= FINDINGS_MAX

    def summary(self) -> str:
        """One line: inputs, rate, kinds of outcomes, memory, findings."""
        seconds = time.monotonic() - self._start
        accepted = sum(n for outcome, n in self.outcomes.items() if "accepted" in outcome)
        return (
            f"{self._target.name}: {self.count:,} inputs in {seconds:.0f} s"
            f" ({self.count / max(seconds, 1e-9):,.0f}/s), {accepted:,} accepted,"
            f" {len(self.outcomes)} outcomes, memory grew by {self.growth_mib:.0f} MiB,"
            f" {len(self.findings)} findings"
        )

    def end(self) -> NoReturn:
        """Print the summary and end the process: with 0, or 1 where something was found."""
        print(self.summary(), file=self._out, flush=True)
        os._exit(bool(self.findings))

    @property
    def growth_mib(self) -> float:
        """How far the process's largest size has grown since the start."""
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
    """Within the block the address space grows by no more than this: what asks for more fails.

    Only Linux tells how large the address space is; elsewhere nothing is bounded.
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
    """The inputs that found something once."""
    return [path.read_bytes() for path in sorted((CORPUS / target.name).glob("*"))]
