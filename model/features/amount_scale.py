"""The scale of amounts: what counts as small and as usual in a currency."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class AmountScale(msgspec.Struct, frozen=True):
    """Small and usual amounts in the currency of a checkpoint, from its training data.

    Attributes:
        floor: smallest denominator of a ratio. A payment below it, such as a card check of 0.00
            or 0.01, does not change the usual amount.
        usual: usual amount of an account without a payment.
    """

    floor: float = 1.0
    usual: float = 50.0

    @classmethod
    def of(cls, account: Int64 | NDArray[np.int32], amount: Float64) -> AmountScale:
        """Compute the scale of a log from quantiles of its accounts' mean amounts.

        The floor is a fifth of the mean amount of the fifth percentile of accounts.

        Args:
            account: [N] any whole numbers.
            amount: [N].

        >>> AmountScale.of(np.array([1, 1, 2]), np.array([10.0, 30.0, 40.0]))
        AmountScale(floor=4.2, usual=30.0)
        """
        _, code, count = np.unique(account, return_inverse=True, return_counts=True)
        mean = np.bincount(code, amount) / count
        mean = mean[mean > 0]
        if len(mean) == 0:
            return cls()
        low, middle = np.quantile(mean, [FLOOR_QUANTILE, 0.5])
        return cls(float(low) * FLOOR_SHARE, float(middle))


FLOOR_QUANTILE = 0.05
FLOOR_SHARE = 0.2
