"""The sizes of a forecast head, and the levels and groups of what it gives."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

LEVELS = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95)
"""Levels of the quantiles."""

DAYS_MAX = 30
"""Most days of a forecast. The decoder is trained on as many."""

LENGTHS = (1, 10, 30, 100)
"""Fewest payments of each group of history lengths, by which a forecast is calibrated."""

WEEKDAYS = 7
PREFIX = "forecast."
"""Beginning of the names of the head's tensors in a checkpoint."""

LOG_MEAN_RANGE = (-12.0, 9.0)
"""Bounds of the logarithm of a day's expected number of payments."""

LOG_DISPERSION_RANGE = (-4.0, 8.0)
"""Bounds of the logarithm of the count's dispersion r; the variance is ``m + m**2 / r``."""

LOG_SCALE_RANGE = (-12.0, 12.0)
"""Bounds of the logarithm of the unit of a day's amounts."""

LOG_RATE_MIN = -3.0
"""Smallest logarithm of the rate that scales amounts."""

SIZE_MAX = 1024
"""Largest size of a layer of the head."""

OUTPUTS = 2 + 2 * len(LEVELS) + 2 + 2
"""Raw outputs of a day.

They are the mean and dispersion of the count, the scale and quantiles of the amount, those of the
largest payment, the hazard of silence, and fraud.
"""

Size = Annotated[int, msgspec.Meta(ge=1, le=SIZE_MAX)]


class ForecastShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and measures of a forecast head; the part ``forecast`` of a checkpoint's header.

    Attributes:
        context_size: units that summarise the account.
        hidden_size: units of the decoder's own hidden state.
        bookkeeping: inputs from the account's bookkeeping. It is the number of
            :data:`model.forecast.inputs.BOOKKEEPING` in heads that do not say it.
        samples: pairs of account and time that it was trained on.
        metrics: measures on the held-out days, by name.
    """

    context_size: Size = 64
    hidden_size: Size = 32
    bookkeeping: Size = 18
    samples: int = 0
    metrics: dict[str, float] = {}

    def tensor_shapes(self, encoder: int, days: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, by its name without :data:`PREFIX`.

        Args:
            encoder: size of the account's hidden state.
            days: inputs of a day.
        """
        c, h = self.context_size, self.hidden_size
        return {
            "context.weight": (c, self.bookkeeping + encoder),
            "context.bias": (c,),
            "start.weight": (h, c),
            "start.bias": (h,),
            "cell.weight_ih": (3 * h, days),
            "cell.weight_hh": (3 * h, h),
            "cell.bias_ih": (3 * h,),
            "cell.bias_hh": (3 * h,),
            "joined.weight": (c, h + c),
            "joined.bias": (c,),
            "output.weight": (OUTPUTS, c),
            "output.bias": (OUTPUTS,),
            **CALIBRATION_SHAPES,
        }


CALIBRATION_SHAPES: dict[str, tuple[int, ...]] = {
    "calibration.amount": (len(LENGTHS), WEEKDAYS, len(LEVELS)),
    "calibration.largest": (len(LENGTHS), WEEKDAYS, len(LEVELS)),
    "calibration.payments": (len(LENGTHS), WEEKDAYS),
    "calibration.silent": (len(LENGTHS),),
    "calibration.fraud": (len(LENGTHS),),
}
"""Factors of quantiles and counts by history length and weekday; shifts of two logits."""


def length_group(count: NDArray[np.integer]) -> NDArray[np.intp]:
    """Return the place in :data:`LENGTHS` of numbers of payments [n].

    >>> length_group(np.array([1, 9, 10, 5000])).tolist()
    [0, 0, 1, 3]
    """
    group = np.searchsorted(np.array(LENGTHS), count, side="right") - 1
    return np.maximum(group, 0)
