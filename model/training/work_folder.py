"""The work folder of a training, beside its output file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from model.training.settings import TrainingError

_CLAIM = "recur.json"


class _Claim(msgspec.Struct, frozen=True):
    """Marks the folder as one of a training.

    Attributes:
        recur_training: digest of all that decides the checkpoint.
    """

    recur_training: str


@contextmanager
def open_work_folder(output: Path, identity: str) -> Iterator[Path]:
    """Lock ``OUTPUT.resume/``, empty or as a training of the same identity left it.

    Raises:
        TrainingError: the folder cannot be written, belongs to another program, or is in use.
    """
    folder = output.with_name(output.name + ".resume")
    claim = _Claim(hashlib.sha256(identity.encode()).hexdigest())
    try:
        found = _claim_of(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock", output):
            if found != claim:
                for path in folder.iterdir():
                    if path.name != "lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                (folder / _CLAIM).write_bytes(msgspec.json.encode(claim))
            yield folder
    except OSError as error:
        raise TrainingError(
            f"cannot write in {folder}: {error.strerror or error}; name a file elsewhere"
        ) from error


@contextmanager
def _locked(path: Path, output: Path) -> Iterator[None]:
    try:
        with FileLock(path, blocking=False):
            yield
    except Timeout as error:
        raise TrainingError(
            f"another training is writing {output}: wait for it, or name another file"
        ) from error


def _claim_of(folder: Path) -> _Claim | None:
    if not folder.exists():
        return None
    try:
        return msgspec.json.decode((folder / _CLAIM).read_bytes(), type=_Claim)
    except (OSError, msgspec.DecodeError) as error:
        if folder.is_dir() and set(p.name for p in folder.iterdir()) <= {"lock"}:
            return None
        raise TrainingError(
            f"{folder} is there and was not made by a training: move it away"
        ) from error
