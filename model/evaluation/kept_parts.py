"""Finished parts of a comparison in a folder, so that an interrupted one goes on with the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from model.generator.generator import Generator
from model.whole_file import write_whole

T = TypeVar("T")

KEPT_GENERATOR = "generator.safetensors"


class KeptParts:
    """Results of a comparison's parts.

    Args:
        folder: an existing folder of this comparison alone; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def generator(self, train: Callable[[], Generator]) -> Generator:
        """Return the kept generator; without one, train it and keep it."""
        path = self.folder / KEPT_GENERATOR
        if path.exists():
            return Generator.load(path)
        found = train()
        found.save(path)
        return found

    def result(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """Return the kept result of a name and type; without one, compute it and keep it."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=kind)
        found = compute()
        write_whole(path, msgspec.json.encode(found))
        return found
