"""Fixtures for the tests of scoring."""

from __future__ import annotations

import pytest

from pipeline.scoring import retry


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Retrier repeat at once: these tests have no event loop that could wait."""
    monkeypatch.setattr(retry, "RETRY_SECONDS", (0,))
