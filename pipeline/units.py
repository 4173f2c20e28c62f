"""Units of time and sizes, each defined once."""

from __future__ import annotations

MINUTE_SECONDS = 60
HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400

HOUR_MS = 3_600_000
DAY_MS = 86_400_000
