"""Opening of a generator file as a stream of histories, with errors for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path

from model.generator.generator import Generator
from model.generator.settings import GeneratorError
from model.generator.stream import HistoryStream, Wish
from pipeline.errors import RecurError, SettingsError

SHIPPED_GENERATOR = Path(__file__).parents[1] / "checkpoints" / "generator.safetensors"
"""The default generator, trained on the simulator."""


def open_stream(
    path: Path,
    given: Mapping[str, float],
    *,
    accounts: int,
    days: int,
    seed: int,
    start_date: str | None = None,
) -> HistoryStream:
    """Open a generator and begin a stream of histories.

    Args:
        path: the generator's file.
        given: numbers of every account's profile.
        accounts: number of accounts.
        days: length of the histories.
        seed: decides every transaction.
        start_date: first day, ISO 8601; None: that of the training data.

    Raises:
        RecurError: the file is no generator, or a value is out of bounds.
    """
    start_ms = None if start_date is None else _midnight_ms(start_date)
    try:
        wish = Wish(accounts, days, seed, start_ms, dict(given))
        return HistoryStream(Generator.load(path), wish)
    except GeneratorError as error:
        raise RecurError(str(error)) from error


def _midnight_ms(text: str) -> int:
    try:
        day = date.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(
            f"--start-date is {text[:40]!r}; it must be a date such as 2024-01-31"
        ) from error
    midnight = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000
    if midnight < 0:
        raise SettingsError("--start-date must be 1970-01-01 or later")
    return midnight
