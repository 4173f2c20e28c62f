"""Control records: the known commands are decoded, and anything else is rejected."""

from __future__ import annotations

import pytest

from model.transaction import ID_MAX_CHARACTERS
from pipeline.errors import RejectedError
from pipeline.messages.control import CONTROL_HEADER, FORGET, LOOK, decode_control

Headers = list[tuple[str, bytes]]


def header(command: bytes) -> Headers:
    return [("another", b"1"), (CONTROL_HEADER, command)]


def test_a_command_to_forget_names_its_account_by_the_key() -> None:
    assert decode_control("Zoë".encode(), None, header(FORGET)) == "Zoë"
    assert decode_control(b"A", b"", header(FORGET)) == "A"


def test_a_command_to_look_needs_no_key_and_asks_for_nothing() -> None:
    assert decode_control(None, None, header(LOOK)) is None


@pytest.mark.parametrize(
    ("key", "value", "headers"),
    [
        (b"A", None, header(b"erase")),
        (b"A", None, header(FORGET) + header(FORGET)),
        (b"A", None, header(FORGET) + header(LOOK)),
        (b"secret", b"{}", header(FORGET)),
        (None, None, header(FORGET)),
        (b"", None, header(FORGET)),
        (b"\xff", None, header(FORGET)),
        (b"x" * (ID_MAX_CHARACTERS + 1), None, header(FORGET)),
    ],
)
def test_a_malformed_control_record_is_rejected_without_its_content(
    key: bytes | None, value: bytes | None, headers: Headers
) -> None:
    with pytest.raises(RejectedError) as caught:
        decode_control(key, value, headers)

    assert caught.value.reason == "control"
    assert "secret" not in str(caught.value)
