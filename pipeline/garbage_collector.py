"""Python's garbage collector in a process that runs for long: tuned, and long pauses logged."""

from __future__ import annotations

import gc
import logging
from time import monotonic

log = logging.getLogger(__name__)

THRESHOLD = 100_000
"""Number of allocated objects after which the collector looks at the young ones."""

PAUSE_LOGGED_MS = 20.0
"""Shortest pause that is logged."""


class PauseLog:
    """Callback of the collector that logs a collection of at least :data:`PAUSE_LOGGED_MS`."""

    def __init__(self) -> None:
        self._began: float | None = None

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """Note the begin of a collection, or log its end."""
        if phase == "start":
            self._began = monotonic()
        elif self._began is not None:
            pause_ms = (monotonic() - self._began) * 1000
            self._began = None
            if pause_ms >= PAUSE_LOGGED_MS:
                log.info(
                    "garbage collector paused the process",
                    extra={"pause_ms": round(pause_ms, 1), "generation": info["generation"]},
                )


def tune_garbage_collector() -> None:
    """Keep the collector from walking objects that stay; call it once, before the work begins.

    Reference counting frees almost all objects. With Python's default threshold of 700, the
    collector takes a tenth of a worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(THRESHOLD, 20, 20)
    gc.callbacks.append(PauseLog())
