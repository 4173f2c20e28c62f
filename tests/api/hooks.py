"""Times that a worker accepts: JSON Schema cannot say that a text is a time of some years."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import schemathesis
from hypothesis import strategies as st

YEARS = 19
"""A worker takes transactions of the last twenty years."""

_now = datetime.now(UTC).replace(microsecond=0, tzinfo=None)
_times = st.datetimes(
    _now - timedelta(days=365 * YEARS), _now - timedelta(days=2), timezones=st.just(UTC)
)
schemathesis.openapi.format("date-time", _times.map(datetime.isoformat))
