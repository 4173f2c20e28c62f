"""Structured logs: one line per message, JSON or text, without payloads or account numbers."""

from __future__ import annotations

import atexit
import json
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pipeline.errors import RecurError

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

QUIET_LOGGERS = ("aiokafka", "faust", "mode", "kafka", "redis", "asyncio")
"""Libraries whose lines are shown from warning on: some write keys and offsets at info."""

SERVICE_OF = {"aiokafka": "kafka", "faust": "kafka", "mode": "kafka", "redis": "redis"}
"""The service that most lines of a library are about."""

SUMMARY_SECONDS = 60.0
"""Time from the first dropped line to a summary of all dropped lines."""

KINDS_MAX = 256
"""Most kinds of lines that are told apart. All further kinds count as one."""

_KIND_CHARACTERS = 160
_SAMPLE_CHARACTERS = 300
_EMPTY_MESSAGE = "We experienced a crash!"
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")


class LibraryLines(logging.Filter):
    """A filter that passes new errors of libraries, and drops and counts their other lines.

    While a service is away, libraries repeat the same lines hundreds of times a second. An error of
    a new kind passes once. An error that only says that a service does not answer is dropped:
    :mod:`pipeline.scoring.outages` reports outages, with the number of these lines. A summary once
    a minute covers all other dropped lines and shows the most frequent one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int, str]] = set()
        self._dropped: Counter[tuple[str, int, str]] = Counter()
        self._samples: dict[tuple[str, int, str], str] = {}
        self._timer: threading.Timer | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is written."""
        top = record.name.partition(".")[0]
        if top not in QUIET_LOGGERS:
            return True
        text = str(record.msg)
        if _is_reported_at_exit(record, text):
            return False
        kind = record.name, record.levelno, _VARYING.sub("#", text)[:_KIND_CHARACTERS]
        with self._lock:
            if kind not in self._seen and len(self._seen) >= KINDS_MAX:
                kind = top, record.levelno, "(others)"
            is_new = kind not in self._seen
            self._seen.add(kind)
            if is_new and record.levelno >= logging.ERROR and not _is_reported_as_outage(record):
                return True
            self._dropped[kind] += 1
            self._samples[kind] = record.getMessage()[:_SAMPLE_CHARACTERS]
            if self._timer is None:
                self._timer = threading.Timer(SUMMARY_SECONDS, self.summarize)
                self._timer.daemon = True
                self._timer.start()
        return False

    def take(self, service: str) -> int:
        """Count the lines about a service that were dropped since the last report."""
        with self._lock:
            kinds = [
                kind
                for kind in self._dropped
                if SERVICE_OF.get(kind[0].partition(".")[0]) == service
            ]
            return sum(self._dropped.pop(kind) for kind in kinds)

    def summarize(self) -> None:
        """Write one line about all dropped lines, if there are any."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            dropped, self._dropped = self._dropped, Counter()
            samples, self._samples = self._samples, {}
        if not dropped:
            return
        (most, times), *_ = dropped.most_common(1)
        logging.getLogger(__name__).warning(
            "lines of libraries were dropped; the log level debug shows them all",
            extra={
                "lines": dropped.total(),
                "kinds": len(dropped),
                "most_often": f"{most[0]}: {samples.get(most, most[2])}",
                "times": times,
            },
        )


def _is_reported_at_exit(record: logging.LogRecord, text: str) -> bool:
    """Tell whether a line is about our own error that the program prints as its last line."""
    return _EMPTY_MESSAGE in text or any(isinstance(e, RecurError) for e in _errors_in(record))


def _is_reported_as_outage(record: logging.LogRecord) -> bool:
    """Tell whether a line only says that a service does not answer."""
    return any(
        isinstance(error, OSError) or getattr(error, "retriable", False)
        for error in _errors_in(record)
    )


def _errors_in(record: logging.LogRecord) -> list[BaseException]:
    args = record.args if isinstance(record.args, tuple) else ()
    errors = [arg for arg in args if isinstance(arg, BaseException)]
    if record.exc_info and record.exc_info[1] is not None:
        errors.append(record.exc_info[1])
    return errors


_library_lines: LibraryLines | None = None


def take_dropped(service: str) -> int:
    """Count the dropped lines about a service, and leave them out of the next summary."""
    return 0 if _library_lines is None else _library_lines.take(service)


def summarize_dropped() -> None:
    """Write the summary of dropped lines now, since the program ends."""
    if _library_lines is not None:
        _library_lines.summarize()


class JsonFormatter(logging.Formatter):
    """Format ``{"time": ..., "level": ..., "logger": ..., "message": ..., <extra fields>}``."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Format a line of JSON."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Format ``12:00:00.123 warning  pipeline.scoring.retry  message  field=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a line of text; a traceback follows on lines of its own."""
        clock = self.formatTime(record, "%H:%M:%S") + f".{int(record.msecs):03d}"
        fields = "".join(f"  {name}={value}" for name, value in _extra(record).items())
        line = f"{clock} {record.levelname.lower():8} {record.name}  {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Drop all but critical lines of a logger and its children within the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def configure(level: str, form: Literal["json", "text"]) -> None:
    """Send all logs from this level on to stderr.

    :class:`LibraryLines` filters lines of libraries, unless the level is debug.
    """
    global _library_lines
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    _library_lines = None
    if level != "debug":
        _library_lines = LibraryLines()
        handler.addFilter(_library_lines)
        atexit.register(_library_lines.summarize)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
