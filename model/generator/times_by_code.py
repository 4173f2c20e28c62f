"""Transactions in order of a code, such as the account or the merchant, and then of time."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

_CODE_MS = 1 << 42
"""Milliseconds between the keys of two codes: more than a log is long."""


class TimesByCode:
    """The order of a log's transactions by code and time.

    Args:
        code: [N] such as the account's.
        time_ms: [N] ascending, as in the log.

    Attributes:
        row: [N] rows of the log in this order.
    """

    def __init__(self, code: NDArray[np.int32], time_ms: Int64) -> None:
        self.row = np.lexsort((time_ms, code))
        self._first_ms = int(time_ms[0])
        self._key = self._key_of(code[self.row], time_ms[self.row])

    def place(
        self, code: NDArray[np.int32], time_ms: Int64, side: Literal["left", "right"] = "left"
    ) -> Int64:
        """Return the places [n] of times [n] of codes [n]; right: after equal times."""
        return np.searchsorted(self._key, self._key_of(code, time_ms), side)

    def _key_of(self, code: NDArray[np.int32], time_ms: Int64) -> Int64:
        return code.astype(np.int64) * _CODE_MS + (time_ms - self._first_ms)
