"""Lua scripts for Redis: read from the ``.lua`` files here, called by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

Command = tuple[str | bytes, ...]
"""A Redis command and its arguments."""


_scripts: dict[bytes, Script] = {}
"""All scripts by their digests."""


@dataclass(frozen=True)
class Script:
    """A Lua script, called by its digest."""

    source: bytes
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest.encode())
        _scripts[self.sha] = self

    def call(self, keys: Sequence[bytes], *arguments: bytes) -> Command:
        """Make the command that runs the script."""
        return "EVALSHA", self.sha, b"%d" % len(keys), *keys, *arguments


def scripts_of(commands: Iterable[Command]) -> list[Script]:
    """List the scripts that the commands call, each once."""
    digests = {command[1]: None for command in commands if command[0] == "EVALSHA"}
    return [_scripts[sha] for sha in digests if isinstance(sha, bytes)]


def load_script(*names: str, **constants: int | str | Mapping[int, str]) -> Script:
    """Read ``<name>.lua``.

    Args:
        names: files with the functions that the script calls, then the script.
        constants: values that they use under these names.
    """
    lines = [f"local {key} = {_literal(value)}\n" for key, value in constants.items()]
    files = [resources.files(__package__).joinpath(f"{name}.lua") for name in names]
    return Script("".join([*lines, *(file.read_text("utf-8") for file in files)]).encode())


def _literal(value: int | str | Mapping[int, str]) -> str:
    """Write a value as Lua does."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f"'{value}'"
    return "{" + ", ".join(f"[{key}] = '{text}'" for key, text in value.items()) + "}"
