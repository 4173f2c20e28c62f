"""Seeds of tests that draw what happens: few of them in `make test-fast`, all in `make test`."""

from __future__ import annotations

from typing import Any

import pytest

QUICK = 4
"""One takes a fraction of a second, and all of them most of a minute."""


def seeds(count: int) -> list[Any]:
    """From 0 on, for ``pytest.mark.parametrize``."""
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, count)]
    return [*range(QUICK), *slow]
