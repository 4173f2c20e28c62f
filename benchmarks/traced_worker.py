"""A worker that traces every other block of polls, and writes the processor time of each block.

:mod:`benchmarks.traced_drain` starts it. One process does both, so that the layout of its memory
and the machine's changes of speed meet both. The thread that sends spans works later than the
polls that it is about, so its time is taken by itself. The time within the tracer's calls is
taken, too: blocks differ from each other by more than tracing costs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExportResult

from pipeline.kafka.polls import Poll
from pipeline.kafka.producer import Outgoing
from pipeline.settings import Settings, load_settings
from pipeline.tracing.polls import PollTracer
from pipeline.tracing.provider import Tracing

POLLS_VARIABLE = "TRACED_WORKER_POLLS"
"""Variable with the number of polls in a block."""

FILE_VARIABLE = "TRACED_WORKER_FILE"
"""Variable with the file that gets a line for each block."""

ORDER = (False, True, True, False)
"""Whether the blocks trace, in turn: a drift of the machine meets both."""


class BlockTime(NamedTuple):
    """A block of polls.

    Attributes:
        traced: whether its polls were traced.
        records: number of its records.
        cpu_ns: processor time of the process without the sending of spans, ns.
        export_ns: processor time of sending spans in the meantime, ns.
        calls_ns: processor time within calls of the tracer, ns; a part of ``cpu_ns``.
    """

    traced: bool
    records: int
    cpu_ns: int
    export_ns: int
    calls_ns: int


class TimedExporter(OTLPSpanExporter):
    """The exporter, with the processor time that it has taken so far in ns."""

    taken_ns = 0

    def export(self, spans: Any) -> SpanExportResult:
        """See OpenTelemetry's exporter."""
        began = time.thread_time_ns()
        try:
            return super().export(spans)
        finally:
            type(self).taken_ns += time.thread_time_ns() - began


class BlockTracer(PollTracer):
    """A tracer of every other block of polls."""

    def __init__(self, tracer: Any, settings: Settings) -> None:
        super().__init__(tracer, settings)
        self._length = int(os.environ[POLLS_VARIABLE])
        self._file = open(os.environ[FILE_VARIABLE], "a", buffering=1)
        self._polls = self._records = self._calls_ns = 0
        self._times = time.process_time_ns(), TimedExporter.taken_ns

    def begin(self, poll: Poll) -> None:
        """Begin a span, if the block traces."""
        block, place = divmod(self._polls, self._length)
        if place == 0 and block:
            before, self._times = self._times, (time.process_time_ns(), TimedExporter.taken_ns)
            cpu, export = (now - then for now, then in zip(self._times, before, strict=True))
            traced = ORDER[(block - 1) % len(ORDER)]
            row = BlockTime(traced, self._records, cpu - export, export, self._calls_ns)
            self._file.write(json.dumps(row) + "\n")
            self._records = self._calls_ns = 0
        self._polls += 1
        self._records += sum(len(chunk.records) for chunk in poll.chunks.values())
        if ORDER[block % len(ORDER)]:
            self._timed(super().begin, poll)

    def computed(self, poll: Poll) -> None:
        """See the tracer."""
        self._timed(super().computed, poll)

    def conclude(self, poll: Poll) -> None:
        """See the tracer."""
        self._timed(super().conclude, poll)

    def end(self, poll: Poll, error: BaseException | None = None) -> None:
        """See the tracer."""
        self._timed(super().end, poll, error)

    def alerts_sent(self, alerts: Iterable[Outgoing], began_ns: int) -> None:
        """See the tracer."""
        self._timed(super().alerts_sent, alerts, began_ns)

    def _timed(self, call: Callable[..., None], *arguments: Any) -> None:
        began = time.thread_time_ns()
        call(*arguments)
        self._calls_ns += time.thread_time_ns() - began


def main() -> None:
    """Run a worker with these."""
    from pipeline.worker import app, process

    def start(settings: Settings, service: str) -> Tracing:
        return Tracing(settings, service, TimedExporter())

    vars(app).update(start_tracing=start, PollTracer=BlockTracer)
    sys.exit(process.run_worker(load_settings()))


if __name__ == "__main__":
    main()
