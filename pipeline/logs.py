"""Structured logs: one line a message, JSON or text, without payloads or account numbers."""

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
"""Of which service a library's lines tell, mostly."""

TELL_SECONDS = 60.0
"""So long after the first one that was left out a line tells of all of them."""

KINDS_MAX = 256
"""Kinds of lines that are told apart; those past it are one."""

_KIND_CHARACTERS = 160
_SAMPLE_CHARACTERS = 300
_SAYS_NOTHING = "We experienced a crash!"
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")


class LibraryLines(logging.Filter):
    """Lets through what is worth a line of what libraries say, and counts the rest.

    While a service is away they say the same some hundred times a second. An error of a new kind
    is let through once, but for one that only says that a service does not answer: that is told
    by :mod:`pipeline.scoring.outages`, with their number. Whatever is told by nothing else is told
    once a minute, with the line that came most often.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int, str]] = set()
        self._left_out: Counter[tuple[str, int, str]] = Counter()
        self._samples: dict[tuple[str, int, str], str] = {}
        self._timer: threading.Timer | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        top = record.name.partition(".")[0]
        if top not in QUIET_LOGGERS:
            return True
        text = str(record.msg)
        if _is_told_at_the_end(record, text):
            return False
        kind = record.name, record.levelno, _VARYING.sub("#", text)[:_KIND_CHARACTERS]
        with self._lock:
            if kind not in self._seen and len(self._seen) >= KINDS_MAX:
                kind = top, record.levelno, "(others)"
            is_new = kind not in self._seen
            self._seen.add(kind)
            if is_new and record.levelno >= logging.ERROR and not _is_told_elsewhere(record):
                return True
            self._left_out[kind] += 1
            self._samples[kind] = record.getMessage()[:_SAMPLE_CHARACTERS]
            if self._timer is None:
                self._timer = threading.Timer(TELL_SECONDS, self.tell)
                self._timer.daemon = True
                self._timer.start()
        return False

    def take(self, service: str) -> int:
        """How many lines about a service were left out since they were told of."""
        with self._lock:
            kinds = [
                kind
                for kind in self._left_out
                if SERVICE_OF.get(kind[0].partition(".")[0]) == service
            ]
            return sum(self._left_out.pop(kind) for kind in kinds)

    def tell(self) -> None:
        """Write one line about all that were left out, if any were."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            left_out, self._left_out = self._left_out, Counter()
            samples, self._samples = self._samples, {}
        if not left_out:
            return
        (most, times), *_ = left_out.most_common(1)
        logging.getLogger(__name__).warning(
            "lines of libraries were left out; the log level debug shows them all",
            extra={
                "lines": left_out.total(),
                "kinds": len(left_out),
                "most_often": f"{most[0]}: {samples.get(most, most[2])}",
                "times": times,
            },
        )


def _is_told_at_the_end(record: logging.LogRecord, text: str) -> bool:
    """Whether a line is about an error of our own that ends the program, and is its last line."""
    return _SAYS_NOTHING in text or any(isinstance(e, RecurError) for e in _errors_in(record))


def _is_told_elsewhere(record: logging.LogRecord) -> bool:
    """Whether a line only says that a service does not answer."""
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


def take_left_out(service: str) -> int:
    """How many lines of libraries about a service were left out; they count as told of."""
    return 0 if _library_lines is None else _library_lines.take(service)


def tell_left_out() -> None:
    """Tell of what was left out now: the program ends."""
    if _library_lines is not None:
        _library_lines.tell()


class JsonFormatter(logging.Formatter):
    """``{"time": ..., "level": ..., "logger": ..., "message": ..., <extra fields>}``."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
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
    """``12:00:00.123 warning  pipeline.scoring.retry  message  field=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of text; a traceback follows on lines of its own."""
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
    """Within the block, only critical lines of this logger and those below it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def configure(level: str, form: Literal["json", "text"]) -> None:
    """Send all logs to stderr in this form, from this level on.

    Lines of libraries are folded (:class:`LibraryLines`), but at the level debug.
    """
    global _library_lines
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    _library_lines = None
    if level != "debug":
        _library_lines = LibraryLines()
        handler.addFilter(_library_lines)
        atexit.register(_library_lines.tell)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
