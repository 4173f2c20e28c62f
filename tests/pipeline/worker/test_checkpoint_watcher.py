"""The watcher finds new thresholds in the checkpoint file, and ignores other changes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from model.checkpoint import Checkpoint, CheckpointThresholds
from pipeline.worker.checkpoint_watcher import CheckpointWatcher
from tests.fakes.memory_workers import small_checkpoint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    small_checkpoint().save(path)
    return path


def watch(file: Path) -> CheckpointWatcher:
    loaded = Checkpoint.load(file)
    return CheckpointWatcher(file, loaded.digest, loaded.header.thresholds)


def test_new_thresholds_are_returned_once(file: Path) -> None:
    watcher = watch(file)
    assert watcher.new_thresholds() is None

    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.2, 0.7)).save(file)

    assert watcher.new_thresholds() == CheckpointThresholds(0.2, 0.7)
    assert watcher.new_thresholds() is None


def test_thresholds_written_between_load_and_first_look_are_found(file: Path) -> None:
    watcher = watch(file)
    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.2, 0.7)).save(file)

    assert watcher.new_thresholds() == CheckpointThresholds(0.2, 0.7)


def test_the_same_thresholds_in_a_new_file_change_nothing(file: Path) -> None:
    watcher = watch(file)
    small_checkpoint().with_header(metrics={"average_precision": 0.5}).save(file)

    assert watcher.new_thresholds() is None


def test_another_model_causes_one_warning_and_is_not_used(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = watch(file)
    small_checkpoint(seed=1).with_header(thresholds=CheckpointThresholds(0.2, 0.7)).save(file)

    assert [watcher.new_thresholds() for _ in range(3)] == [None] * 3

    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "restart to use the new model" in line.getMessage()

    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.1, 0.8)).save(file)
    assert watcher.new_thresholds() == CheckpointThresholds(0.1, 0.8), "the model in use is back"


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_broken_or_missing_file_is_logged_once_and_the_next_good_one_counts(
    file: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = watch(file)
    watcher.new_thresholds()
    if content is None:
        os.remove(file)
    else:
        file.write_bytes(content)

    assert [watcher.new_thresholds() for _ in range(3)] == [None] * 3

    (line,) = caplog.records
    assert line.levelno == logging.ERROR
    assert str(file) in line.getMessage()

    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.1, 0.8)).save(file)
    assert watcher.new_thresholds() == CheckpointThresholds(0.1, 0.8)
