"""The checkpoint's file as it changes under a running worker: new thresholds count at once.

Only thresholds may change without a restart. They are in the header and not in the digest, so
that states and scores stay those of the same model.
"""

from __future__ import annotations

import logging
from pathlib import Path

from model.checkpoint import Checkpoint, CheckpointError, CheckpointThresholds

log = logging.getLogger(__name__)


class CheckpointWatcher:
    """Looks whether the file of the checkpoint in use has become another.

    Args:
        path: of the file.
        digest: of the model in use.
        thresholds: its header's when it was loaded.
    """

    def __init__(self, path: Path, digest: str, thresholds: CheckpointThresholds) -> None:
        self._path = path
        self._digest = digest
        self._thresholds = thresholds
        self._seen: object = "nothing"

    def look(self) -> CheckpointThresholds | None:
        """The file's thresholds if they are new; None if there is nothing to do.

        A file with another model, or one that cannot be read, is logged once and changes
        nothing. Reads a file: call it from a thread that may wait.
        """
        seen = self._stamp()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            found = Checkpoint.load(self._path)
        except CheckpointError as error:
            log.error("the checkpoint file is broken; going on as before: %s", error)
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
        """What changes when the file does; None without a file."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
