"""Watcher of the checkpoint file: a running worker uses new thresholds without a restart.

Only thresholds may change so. They are in the header, but not in the digest, so states and scores
still belong to the same model.
"""

from __future__ import annotations

import logging
from pathlib import Path

from model.checkpoint import Checkpoint, CheckpointError, CheckpointThresholds

log = logging.getLogger(__name__)


class CheckpointWatcher:
    """Watcher of the file of the checkpoint in use.

    Args:
        path: path of the file.
        digest: digest of the model in use.
        thresholds: thresholds of the loaded header.
    """

    def __init__(self, path: Path, digest: str, thresholds: CheckpointThresholds) -> None:
        self._path = path
        self._digest = digest
        self._thresholds = thresholds
        self._seen: object = "not read yet"

    def new_thresholds(self) -> CheckpointThresholds | None:
        """Return the file's thresholds if they are new; None if there is nothing to do.

        A file with another model or an unreadable file is logged once, and changes nothing. The
        call reads a file: make it from a thread that may wait.
        """
        seen = self._stamp()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            found = Checkpoint.load(self._path)
        except CheckpointError as error:
            log.error("the checkpoint file is broken; the worker keeps its thresholds: %s", error)
            return None
        if found.digest != self._digest:
            log.warning(
                "the checkpoint file holds another model; restart to use the new model",
                extra={"model": self._digest, "new_model": found.digest},
            )
            return None
        if found.header.thresholds == self._thresholds:
            return None
        self._thresholds = found.header.thresholds
        return self._thresholds

    def _stamp(self) -> object:
        """Return a value that changes when the file does; None without a file."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
