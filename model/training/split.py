"""The periods of a data set: warm-up, training, validation, gap, held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.training.settings import TrainingError, TrainingSettings
from model.units import DAY_MS

DAYS_MIN = 8
"""Fewest days of data; each period needs one or two."""

WARM_UP_DAYS_MAX = 14
VALIDATION_DAYS_MAX = 60
HELD_OUT_DAYS_MAX = 120


@dataclass(frozen=True)
class Split:
    """First day of each period, counted from the first day of the data.

    A period ends where the next begins. The warm-up fills the histories and counts in no loss. The
    training days are learned from. The validation days decide the best epoch, the calibration and
    the thresholds. In the gap the last labels arrive. The held-out days give the metrics.

    >>> Split.of(183)
    Split(training=14, validation=132, gap=146, held_out=153, end=183)
    >>> Split.of(30)
    Split(training=2, validation=21, gap=23, held_out=25, end=30)
    >>> Split.of(183, until_day=91, from_day=98)
    Split(training=7, validation=84, gap=91, held_out=98, end=183)
    """

    training: int
    validation: int
    gap: int
    held_out: int
    end: int

    @classmethod
    def of(
        cls,
        days: int,
        label_delay_days: float = 7.0,
        until_day: int | None = None,
        from_day: int | None = None,
    ) -> Split:
        """Hold out a sixth of the days and validate on a thirteenth, within the bounds above.

        Args:
            days: days of data.
            label_delay_days: length of the gap; it is shorter with fewer than 183 days of data.
            until_day: first day of the gap, if it is given.
            from_day: first held-out day, if it is given.

        Raises:
            TrainingError: too few days, or no room for a period.
        """
        if days < DAYS_MIN:
            raise TrainingError(
                f"the data span {days} days; training needs {DAYS_MIN} or more to set some aside"
            )
        if until_day is None:
            delay = math.ceil(label_delay_days * min(1.0, days / 183))
            held_out = (
                days - min(HELD_OUT_DAYS_MAX, round(days / 6)) if from_day is None else from_day
            )
            gap = held_out - delay
        else:
            gap = until_day
            held_out = gap + math.ceil(label_delay_days) if from_day is None else from_day
        known = gap if until_day is not None else days
        validation = gap - min(VALIDATION_DAYS_MAX, max(1, round(known / 13)))
        split = cls(min(WARM_UP_DAYS_MAX, round(known / 13)), validation, gap, held_out, days)
        if not 0 <= split.training < validation < gap <= held_out < days:
            raise TrainingError(
                f"the data span {days} days; training until day {gap} and testing from day "
                f"{held_out} leaves no room for each of training, validation and test: change "
                "train_until or test_from"
            )
        return split

    @classmethod
    def chosen(cls, settings: TrainingSettings, first_ms: int, days: int) -> Split:
        """Return the split that the settings define.

        Args:
            settings: the settings of the training.
            first_ms: time of the first transaction, epoch milliseconds.
            days: days of data.
        """

        def day_of(name: str) -> int | None:
            moment = settings.moment_ms(name)
            return None if moment is None else math.ceil(moment / DAY_MS) - first_ms // DAY_MS

        return cls.of(days, settings.label_delay_days, day_of("train_until"), day_of("test_from"))
