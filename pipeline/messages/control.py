"""Control records: operators' commands to workers, sent through the transactions topic."""

from __future__ import annotations

from collections.abc import Sequence

from model.transaction import ID_MAX_CHARACTERS
from pipeline.errors import RejectedError

CONTROL_HEADER = "recur-control"
"""Header of a control record. Its value names the command; the record has no value."""

FORGET = b"forget"
"""Command to forget the account that is the record's key. The account starts without a state."""

LOOK = b"look"
"""Command that does nothing but wake a worker: with each poll it reads the watermark."""


def decode_control(
    key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
) -> str | None:
    """Decode a record with a control header.

    Returns:
        the account to forget, or None for a command that asks for nothing.

    Raises:
        RejectedError: this version does not know the command, or the record is malformed.
    """
    commands = [text for name, text in headers if name == CONTROL_HEADER]
    if commands not in ([FORGET], [LOOK]):
        raise RejectedError("control", "this version does not know the control record's command")
    if value:
        raise RejectedError("control", "a control record must have no value")
    if commands == [LOOK]:
        return None
    try:
        account_id = (key or b"").decode()
    except UnicodeDecodeError:
        account_id = ""
    if not 0 < len(account_id) <= ID_MAX_CHARACTERS:
        raise RejectedError("control", "the key of this control record is no account id")
    return account_id
