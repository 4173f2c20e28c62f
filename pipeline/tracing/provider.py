"""The OpenTelemetry SDK of a process: sampler, exporter and a bounded end.

The SDK and its exporter are the extra ``tracing``. This module imports them only if tracing is on.
The variables ``OTEL_EXPORTER_OTLP_*``, ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES`` and
``OTEL_BSP_*`` are the SDK's own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Tracer

from pipeline.errors import SettingsError
from pipeline.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler

STOP_SECONDS = 3.0
"""Longest wait for the last spans to reach the collector, at the end of a process."""

INSTRUMENTATION = "recur"


class Tracing:
    """A process's spans, on their way to a collector.

    Args:
        settings: whether to trace, and the ratio.
        service: name of the process where ``OTEL_SERVICE_NAME`` is not set.
        exporter: takes the spans; None for OTLP over HTTP.

    Raises:
        SettingsError: the extra is not installed.
    """

    def __init__(
        self, settings: Settings, service: str, exporter: SpanExporter | None = None
    ) -> None:
        try:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise SettingsError(
                f"RECUR_TRACING needs the extra `tracing`, and {error.name} is not installed:"
                " pip install 'recur[tracing]'"
            ) from error
        named = {
            "service.name": service,
            "service.version": version("recur"),
            "service.instance.id": str(uuid.uuid4()),
        }
        resource = Resource(named).merge(OTELResourceDetector().detect())
        # atexit would wait for a collector that is away, without a bound of ours.
        self._provider = TracerProvider(
            sampler=sampler(settings.trace_sample_ratio), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    @property
    def tracer(self) -> Tracer:
        """OpenTelemetry's tracer."""
        return self._provider.get_tracer(INSTRUMENTATION)

    async def stop(self) -> None:
        """Send the last spans, for :data:`STOP_SECONDS` at most."""
        done = threading.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            done.set()

        # A daemon: the process may end while a collector does not answer.
        threading.Thread(target=shut_down, name="tracing-stop", daemon=True).start()
        if not await asyncio.to_thread(done.wait, STOP_SECONDS):
            logging.getLogger(__name__).warning(
                "the collector did not take the last spans in time; they are lost",
                extra={"seconds": STOP_SECONDS},
            )


def start_tracing(settings: Settings, service: str) -> Tracing | None:
    """Start the SDK if the settings ask for it.

    Args:
        service: name of the process, such as ``recur-worker``.

    Raises:
        SettingsError: the extra is not installed.
    """
    return Tracing(settings, service) if settings.tracing else None


def sampler(ratio: float) -> Sampler:
    """Make a sampler: spans with a sampled parent or link, and this ratio of the others."""
    from opentelemetry.sdk.trace.sampling import (
        ALWAYS_ON,
        ParentBased,
        Sampler,
        SamplingResult,
        TraceIdRatioBased,
    )

    class _LinkedOrRatio(Sampler):
        """Sampler of spans without a parent: those with a sampled link, and a ratio."""

        def __init__(self) -> None:
            self._ratio = TraceIdRatioBased(ratio)

        def should_sample(
            self,
            parent_context: Any,
            trace_id: int,
            name: str,
            kind: Any = None,
            attributes: Any = None,
            links: Sequence[Any] | None = None,
            trace_state: Any = None,
        ) -> SamplingResult:
            """See OpenTelemetry's sampler."""
            sampled = any(link.context.trace_flags.sampled for link in links or ())
            chosen: Sampler = ALWAYS_ON if sampled else self._ratio
            return chosen.should_sample(
                parent_context, trace_id, name, kind, attributes, links, trace_state
            )

        def get_description(self) -> str:
            """See OpenTelemetry's sampler."""
            return f"LinkedOr{{{self._ratio.get_description()}}}"

    return ParentBased(_LinkedOrRatio())
