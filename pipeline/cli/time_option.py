"""A time that a person wrote on the command line."""

from __future__ import annotations

from datetime import datetime

from model.transaction import TIMESTAMP_MAX_MS
from pipeline.errors import SettingsError
from pipeline.timestamps import other_unit


def epoch_ms_of(text: str, option: str) -> int:
    """Epoch milliseconds of ISO 8601 with a zone, or of milliseconds.

    Args:
        option: which one it is of, for the message.

    Raises:
        SettingsError: it is no time.
    """
    if text.isascii() and text.isdigit():
        unit = other_unit(int(text))
        if unit is not None:
            raise SettingsError(f"{option} looks like {unit}; write milliseconds")
        if int(text) <= TIMESTAMP_MAX_MS:
            return int(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None or when.timestamp() < 0:
        raise SettingsError(
            f"{option} is no time: write it as 2024-05-31T18:00:00Z or in milliseconds since 1970"
        )
    return round(when.timestamp() * 1000)
