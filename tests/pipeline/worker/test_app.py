"""The worker around the processor, without a broker."""

from __future__ import annotations

from pathlib import Path

import pytest
from faust.types import TP

from pipeline.checkpoint import load_checkpoint
from pipeline.settings import load_settings
from pipeline.worker.app import Worker, faust_app


def test_a_worker_that_never_begins_on_its_partitions_is_stalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust starts the monitors late, so a worker may hang before the lag is ever measured."""
    settings = load_settings(http_port=0, watchdog_seconds=5.0)
    worker = Worker(settings, load_checkpoint(settings), partitions=4, directory=tmp_path)
    worker.http_server.start()
    try:
        now = 100.0
        monkeypatch.setattr(worker.health, "_clock", lambda: now)
        labels = TP(settings.topic("labels"), 1)
        worker._on_assigned({labels})
        now = 200.0
        assert worker.health.live
        worker._on_assigned({labels, TP(settings.topic("transactions"), 1)})
        assert worker.health.live
        now = 206.0
        assert not worker.health.live
    finally:
        worker.http_server.stop()


@pytest.mark.parametrize(("name", "told"), [("", None), ("worker-3", "worker-3")])
def test_the_group_is_told_a_workers_own_name_if_it_has_one(
    tmp_path: Path, name: str, told: str | None
) -> None:
    app = faust_app(load_settings(kafka_group_instance_id=name), tmp_path)
    assert app.conf.consumer_group_instance_id == told
