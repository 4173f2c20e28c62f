"""Structured logs: one line a message, JSON or text, without payloads or account numbers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

QUIET_LOGGERS = ("aiokafka", "faust", "mode", "kafka", "redis", "asyncio")
"""Libraries whose lines are shown from warning on: some write keys and offsets at info."""


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
    """``12:00:00.123 warning  pipeline.patience  message  field=value``."""

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
    """Send all logs to stderr in this form, from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
