"""Lua scripts for Redis: read from the ``.lua`` files here, called by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

Command = tuple[str | bytes, ...]
"""A Redis command and its arguments."""


@dataclass(frozen=True)
class Script:
    """A Lua script, called by its digest."""

    source: bytes
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest.encode())

    def call(self, keys: Sequence[bytes], *arguments: bytes) -> Command:
        """Make the command that runs the script."""
        return "EVALSHA", self.sha, b"%d" % len(keys), *keys, *arguments


def load_script(name: str, **constants: int | str | Mapping[int, str]) -> Script:
    """Read ``<name>.lua``.

    Args:
        constants: values that the script uses under these names.
    """
    lines = [f"local {key} = {_literal(value)}\n" for key, value in constants.items()]
    source = resources.files(__package__).joinpath(f"{name}.lua").read_text("utf-8")
    return Script("".join([*lines, source]).encode())


def _literal(value: int | str | Mapping[int, str]) -> str:
    """Write a value as Lua does."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f"'{value}'"
    return "{" + ", ".join(f"[{key}] = '{text}'" for key, text in value.items()) + "}"
