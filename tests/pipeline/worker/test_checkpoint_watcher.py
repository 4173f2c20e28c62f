"""New thresholds in the checkpoint's file are found; anything else in it changes nothing."""

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


def test_new_thresholds_are_told_once(file: Path) -> None:
    watched = watch(file)
    assert watched.look() is None

    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.2, 0.7)).save(file)

    assert watched.look() == CheckpointThresholds(0.2, 0.7)
    assert watched.look() is None


def test_thresholds_written_between_load_and_first_look_are_found(file: Path) -> None:
    watched = watch(file)
    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.2, 0.7)).save(file)

    assert watched.look() == CheckpointThresholds(0.2, 0.7)


def test_the_same_thresholds_in_a_new_file_change_nothing(file: Path) -> None:
    watched = watch(file)
    small_checkpoint().with_header(metrics={"average_precision": 0.5}).save(file)

    assert watched.look() is None


def test_another_model_is_warned_of_once_and_not_used(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(file)
    small_checkpoint(seed=1).with_header(thresholds=CheckpointThresholds(0.2, 0.7)).save(file)

    assert [watched.look() for _ in range(3)] == [None] * 3

    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "restart to use the new model" in line.getMessage()

    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.1, 0.8)).save(file)
    assert watched.look() == CheckpointThresholds(0.1, 0.8), "the model in use is back"


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_broken_or_missing_file_is_logged_once_and_the_next_good_one_counts(
    file: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(file)
    watched.look()
    if content is None:
        os.remove(file)
    else:
        file.write_bytes(content)

    assert [watched.look() for _ in range(3)] == [None] * 3

    (line,) = caplog.records
    assert line.levelno == logging.ERROR
    assert str(file) in line.getMessage()

    small_checkpoint().with_header(thresholds=CheckpointThresholds(0.1, 0.8)).save(file)
    assert watched.look() == CheckpointThresholds(0.1, 0.8)
