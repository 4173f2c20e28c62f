"""The protocols of evaluation: which days train a network and which days test it.

A protocol consists of folds. The days of a fold in order: warm-up (seen, not scored), training with
validation at its end, a delay in which labels arrive, test.

    split     one long fold: the later half of the log is the test
    handbook  the protocol of the Fraud Detection Handbook (chapters 5 to 7): four folds a week
              apart, each with a week of training, one of delay and one of test; cards known to
              be fraudulent leave the test day by day

A network may learn from everything before a fold's delay, as a streaming model would. The
Handbook's training week then only decides which cards are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.training.settings import TrainingError
from model.training.split import Split
from model.units import DAY_MS, DAY_SECONDS

ProtocolName = Literal["handbook", "split"]
Rows = NDArray[np.intp]

HANDBOOK_START = "2018-08-15"
"""First day of the Handbook's last training week."""

HANDBOOK_FOLDS = 4
WEEK_DAYS = 7


class ProtocolError(ValueError):
    """A protocol does not fit the log; the message says why and what to change."""


@dataclass(frozen=True)
class Fold:
    """One split of a log. Days are UTC days since 1970-01-01; an end is exclusive.

    Attributes:
        name: short name, unique in its protocol.
        log_from: first day of the log.
        train_until: end of the days whose labels are learned from.
        test_from, test_until: begin and end of the measured days.
        known_from: first day whose frauds make a card known. A known card leaves the test when
            the label arrives. None: no card leaves.
    """

    name: str
    log_from: int
    train_until: int
    test_from: int
    test_until: int
    known_from: int | None = None

    @property
    def split(self) -> Split:
        """The same periods as a training counts them, in days from the first day of the log.

        Raises:
            model.training.settings.TrainingError: there are too few days for all periods.
        """
        return Split.of(
            self.test_until - self.log_from,
            self.test_from - self.train_until,
            until_day=self.train_until - self.log_from,
            from_day=self.test_from - self.log_from,
        )

    def describe(self) -> str:
        """Describe the fold in words.

        >>> Fold("split", 17622, 17713, 17720, 17805).describe()
        'trained to 2018-06-30, tested 2018-07-08 to 2018-09-30'
        """
        last_trained, first, last = (
            iso_date(d) for d in (self.train_until - 1, self.test_from, self.test_until - 1)
        )
        return f"trained to {last_trained}, tested {first} to {last}"

    def trained_rows(self, log: Dataset) -> Rows:
        """Return the rows of training and validation."""
        return self._rows(log, self.log_from + self.split.training, self.train_until)

    def learned_rows(self, log: Dataset) -> Rows:
        """Return the rows that count in a network's loss."""
        split = self.split
        return self._rows(log, self.log_from + split.training, self.log_from + split.validation)

    def validated_rows(self, log: Dataset) -> Rows:
        """Return the rows that decide a network's best epoch and calibration."""
        return self._rows(log, self.log_from + self.split.validation, self.train_until)

    def end_row(self, log: Dataset) -> int:
        """Return the first row after the test."""
        return int(np.searchsorted(log.timestamp_ms, self.test_until * DAY_MS))

    def tested_rows(self, log: Dataset) -> Rows:
        """Return the measured rows, without those of known cards.

        By the Handbook's rule a fraud is known one day after the delay between training and test.
        """
        rows = self._rows(log, self.test_from, self.test_until)
        if self.known_from is None:
            return rows
        delay_days = self.test_from - self.train_until
        day = days_of(log)
        fraud = np.flatnonzero(log.is_fraud & (day >= self.known_from))
        # The first fraud of each card since then: rows are in order of time.
        cards, first = np.unique(log.account[fraud], return_index=True)
        known_on = np.append(day[fraud][first] + delay_days + 1, np.iinfo(np.int64).max)
        place = np.searchsorted(cards, log.account[rows])
        place[place == len(cards)] = -1  # the place of "never"
        place[(place >= 0) & (np.append(cards, 0)[place] != log.account[rows])] = -1
        return np.asarray(rows[day[rows] < known_on[place]])

    def _rows(self, log: Dataset, begin: int, end: int) -> Rows:
        """Return the labelled rows of these days."""
        first, last = np.searchsorted(log.timestamp_ms, [begin * DAY_MS, end * DAY_MS])
        return np.asarray(np.flatnonzero(log.is_labelled[first:last]) + first)


def split_fold(
    log: Dataset,
    train_until: str | None = None,
    test_from: str | None = None,
    test_until: str | None = None,
    label_delay_days: int = 7,
) -> Fold:
    """Make one fold over the whole log; the ends of periods are exclusive.

    Args:
        log: the transactions.
        train_until: end of the days that are learned from. None: half of the days.
        test_from: first measured day. None: the day when all labels of the training arrived.
        test_until: end of the measured days. None: the end of the log.
        label_delay_days: time until a label is known.

    Raises:
        ProtocolError: a text is no date, a date is out of the log or out of order, or a period
            has no fraud.
    """
    first, last = _days_of(log)
    until = first + (last + 1 - first) // 2 if train_until is None else day_of(train_until)
    begin = until + label_delay_days if test_from is None else day_of(test_from)
    end = last + 1 if test_until is None else day_of(test_until)
    return _checked(log, Fold("split", first, until, begin, end), label_delay_days)


def handbook_folds(log: Dataset, start: str = HANDBOOK_START) -> list[Fold]:
    """Make the Handbook's four folds, the earliest first.

    Args:
        log: the transactions.
        start: first day of the last training week; each other fold is a week earlier.

    Raises:
        ProtocolError: the log does not hold all of these days.
    """
    first, _ = _days_of(log)
    folds = []
    for number in range(HANDBOOK_FOLDS):
        week = day_of(start) - WEEK_DAYS * (HANDBOOK_FOLDS - 1 - number)
        fold = Fold(
            f"week-{number + 1}",
            first,
            week + WEEK_DAYS,
            week + 2 * WEEK_DAYS,
            week + 3 * WEEK_DAYS,
            known_from=week,
        )
        folds.append(_checked(log, fold, WEEK_DAYS))
    return folds


def days_of(log: Dataset) -> NDArray[np.int64]:
    """Return the UTC day of each transaction [N] since 1970-01-01."""
    return log.timestamp_ms // DAY_MS


def day_of(text: str) -> int:
    """Return the UTC day of a date, since 1970-01-01.

    >>> day_of("2018-08-15")
    17758
    """
    try:
        found = date.fromisoformat(text)
    except ValueError as error:
        raise ProtocolError(f"{text[:40]!r} is no date such as 2018-08-15") from error
    return int(datetime(found.year, found.month, found.day, tzinfo=UTC).timestamp()) // DAY_SECONDS


def iso_date(day: int) -> str:
    """Return the date of a UTC day since 1970-01-01.

    >>> iso_date(17758)
    '2018-08-15'
    """
    return datetime.fromtimestamp(day * DAY_SECONDS, UTC).date().isoformat()


def _days_of(log: Dataset) -> tuple[int, int]:
    if not len(log):
        raise ProtocolError("the log has no transactions")
    return int(log.timestamp_ms[0] // DAY_MS), int(log.timestamp_ms[-1] // DAY_MS)


def _checked(log: Dataset, fold: Fold, label_delay_days: int) -> Fold:
    first, last = _days_of(log)
    if not first < fold.train_until < fold.test_from < fold.test_until <= last + 1:
        raise ProtocolError(
            f"{fold.describe()}: the log has the days {iso_date(first)} to {iso_date(last)}, "
            "and training, test from and test until must follow each other in them; choose "
            "other dates"
        )
    if fold.test_from - fold.train_until < label_delay_days:
        raise ProtocolError(
            f"{fold.describe()}: labels take {label_delay_days} days, so that the last ones of "
            f"the training arrive when the test has begun; test from "
            f"{iso_date(fold.train_until + label_delay_days)} or later"
        )
    try:
        periods = {
            "training": fold.learned_rows(log),
            "validation": fold.validated_rows(log),
            "test": fold.tested_rows(log),
        }
    except TrainingError as error:
        raise ProtocolError(f"{fold.describe()}: {error}") from error
    for what, rows in periods.items():
        frauds = int(log.is_fraud[rows].sum())
        if not 0 < frauds < len(rows):
            raise ProtocolError(
                f"{fold.describe()}: {frauds} of the {len(rows)} transactions of the {what} are "
                "fraud; both kinds must be there: choose other dates or a longer log"
            )
    return fold
