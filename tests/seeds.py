"""Seeds of tests that draw what happens: few of them in `make test-fast`, all in `make test`."""

from __future__ import annotations

from typing import Any

import pytest

QUICK = 4
"""Seeds that `make test-fast` runs of each family."""


def seeds(count: int) -> list[Any]:
    """Return seeds from 0 on for ``pytest.mark.parametrize``."""
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, count)]
    return [*range(QUICK), *slow]
