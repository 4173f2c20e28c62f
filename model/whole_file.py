"""A file that is written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` to write; it becomes ``path`` at the end, unless that fails.

    A missing folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    partial = _beside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, and its folder if that is missing.

    Raises:
        OSError: the file cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def check_whole_file(path: Path) -> None:
    """Check that the file could be written, before the work for it begins.

    Raises:
        OSError: it could not.
    """
    partial = _beside(path)
    partial.touch()
    partial.unlink()


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
