"""Long collections are logged, and short ones are not."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

from pipeline import garbage_collector
from pipeline.garbage_collector import PauseLog


@pytest.fixture(autouse=True)
def pause_log() -> Iterator[None]:
    callback = PauseLog()
    gc.callbacks.append(callback)
    yield
    gc.callbacks.remove(callback)


@pytest.mark.parametrize(("shortest_ms", "lines"), [(0.0, 1), (1e9, 0)])
def test_a_collection_is_logged_if_it_takes_long(
    shortest_ms: float,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(garbage_collector, "PAUSE_LOGGED_MS", shortest_ms)
    gc.disable()
    try:
        with caplog.at_level(logging.INFO, garbage_collector.__name__):
            gc.collect()
    finally:
        gc.enable()

    assert [record.__dict__["generation"] for record in caplog.records] == [2] * lines
    assert all(record.__dict__["pause_ms"] >= 0 for record in caplog.records)
