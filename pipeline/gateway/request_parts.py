"""Parts of requests that several routes read: ids in paths, queries, preferences, bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from model.transaction import ID_MAX_CHARACTERS
from pipeline.errors import SettingsError
from pipeline.gateway.context import AsgiScope
from pipeline.gateway.problems import (
    INVALID_PARAMETER,
    UNSUPPORTED_MEDIA_TYPE,
    FieldError,
    Problem,
)
from pipeline.gateway.tenants import not_found
from pipeline.timestamps import epoch_ms_of

QUERY_FIELDS_MAX = 32
"""Most fields of a query."""

_MILLISECONDS = re.compile(r"[0-9]{11,14}")
_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_WAIT = re.compile(r"wait=(\d{1,6})")
_NUMBER = re.compile(r"\d{1,9}")
_SHARE = re.compile(r"\d{1,3}(\.\d{1,20})?([eE]-\d{1,2})?")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def id_of_path(scope: AsgiScope, prefix: str) -> str:
    """Return the id that follows a prefix of the path; it may hold any character, quoted.

    Raises:
        Problem: no record has such an id (404).
    """
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    try:
        name = unquote_to_bytes(raw[len(prefix) :]).decode()
    except UnicodeDecodeError:
        raise not_found() from None
    if not 1 <= len(name) <= ID_MAX_CHARACTERS:
        raise not_found()
    return name


def location_of(transaction_id: str) -> str:
    """Return the path of a transaction's score."""
    return f"/v1/scores/{quote(transaction_id, safe='')}"


def headers_named(scope: AsgiScope, name: bytes) -> list[str]:
    """Return the values of all headers of a name."""
    return [value.decode("latin-1") for found, value in scope["headers"] if found == name]


@dataclass(frozen=True)
class Wait:
    """How long a request waits for a score.

    Attributes:
        seconds: the time.
        is_preferred: whether the request named it.
    """

    seconds: float
    is_preferred: bool


def preferred_wait(scope: AsgiScope, default_ms: int, most_ms: int) -> Wait:
    """Read ``Prefer: wait=SECONDS`` or ``respond-async`` (RFC 7240); other ones are ignored."""
    for header in headers_named(scope, b"prefer"):
        for preference in header.split(","):
            text = preference.partition(";")[0].strip().lower()
            if text == "respond-async":
                return Wait(0.0, True)
            found = _WAIT.fullmatch(text.replace(" ", "").replace('"', ""))
            if found is not None:
                return Wait(min(float(found[1]), most_ms / 1000), True)
    return Wait(default_ms / 1000, False)


def idempotency_key(scope: AsgiScope) -> str | None:
    """Read ``Idempotency-Key``: a text, quoted or not.

    Raises:
        Problem: it has characters that a key may not have (400).
    """
    found = headers_named(scope, b"idempotency-key")
    if not found:
        return None
    key = found[0].strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if len(found) > 1 or not _IDEMPOTENCY_KEY.fullmatch(key):
        error = FieldError("1 to 255 visible ASCII characters", header="Idempotency-Key")
        raise Problem(INVALID_PARAMETER, errors=[error])
    return key


def require_json(scope: AsgiScope) -> None:
    """Refuse a body that says that it is no JSON; one that says nothing counts as JSON.

    Raises:
        Problem: 415.
    """
    for value in headers_named(scope, b"content-type"):
        kind = value.partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            error = FieldError("must be application/json", header="Content-Type")
            raise Problem(UNSUPPORTED_MEDIA_TYPE, errors=[error])


class Query:
    """The query of a request; each of its fields may occur once.

    Args:
        scope: the request's.
        names: the fields that the route knows.

    Raises:
        Problem: it has an unknown field, or one twice (400).
    """

    def __init__(self, scope: AsgiScope, names: Iterable[str]) -> None:
        known = set(names)
        try:
            pairs = parse_qsl(
                scope.get("query_string", b"").decode("ascii"),
                keep_blank_values=True,
                max_num_fields=QUERY_FIELDS_MAX,
                errors="strict",
            )
        except ValueError:
            raise _wrong("query", "is not percent-encoded UTF-8") from None
        self._values: dict[str, str] = {}
        for name, value in pairs:
            if name not in known:
                shown = name if name.isprintable() and len(name) <= 64 else "?"
                raise _wrong(shown, f"is unknown; known are {', '.join(sorted(known))}")
            if name in self._values:
                raise _wrong(name, "is there twice")
            self._values[name] = value

    def text(self, name: str, most: int) -> str | None:
        """Return a text of at most this many characters.

        Raises:
            Problem: it is empty or longer (400).
        """
        value = self._values.get(name)
        if value is not None and not 1 <= len(value) <= most:
            raise _wrong(name, f"has 1 to {most} characters")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Return one of the choices.

        Raises:
            Problem: it is another text (400).
        """
        value = self._values.get(name)
        if value is not None and value not in choices:
            raise _wrong(name, f"is one of {', '.join(choices)}")
        return value

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """Return a whole number.

        Raises:
            Problem: it is none, or out of bounds (400).
        """
        value = self._values.get(name)
        if value is None:
            return default
        if not (value.isascii() and _NUMBER.fullmatch(value)) or not least <= int(value) <= most:
            raise _wrong(name, f"is a whole number from {least} to {most}")
        return int(value)

    def share(self, name: str) -> float | None:
        """Return a number from 0 to 1.

        Raises:
            Problem: it is none (400).
        """
        value = self._values.get(name)
        if value is None:
            return None
        if not (value.isascii() and _SHARE.fullmatch(value)) or float(value) > 1:
            raise _wrong(name, "is a number from 0 to 1")
        return float(value)

    def time_ms(self, name: str) -> int | None:
        """Return a time in epoch milliseconds; the query has it so, or in RFC 3339.

        Raises:
            Problem: it is no time (400).
        """
        value = self._values.get(name)
        if value is None:
            return None
        try:
            if _MILLISECONDS.fullmatch(value) or _RFC_3339.fullmatch(value):
                return epoch_ms_of(value.upper(), name)
        except (SettingsError, OverflowError):
            pass  # it looks like a time, and is none
        raise _wrong(name, "is 2024-05-31T18:00:00Z, or milliseconds since 1970")


def _wrong(name: str, what: str) -> Problem:
    return Problem(INVALID_PARAMETER, errors=[FieldError(what, parameter=name)])
