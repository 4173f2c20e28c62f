"""Loading of the checkpoint that the settings name."""

from __future__ import annotations

from model.checkpoint import Checkpoint, CheckpointError
from pipeline.errors import StartupError
from pipeline.settings import Settings


def load_checkpoint(settings: Settings) -> Checkpoint:
    """Load the checkpoint that the settings name.

    Raises:
        StartupError: the file is missing or no checkpoint. The message says what is wrong.
    """
    try:
        return Checkpoint.load(settings.checkpoint)
    except CheckpointError as error:
        raise StartupError(
            f"{error}. Set RECUR_CHECKPOINT to a file that `recur train` wrote"
        ) from error
