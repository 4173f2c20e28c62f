"""Signatures, verified by the reference libraries and by another implementation of Ed25519."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest
import standardwebhooks
import svix.webhooks
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pipeline.webhooks.signing import (
    Ed25519Signer,
    new_key_pair,
    new_secret,
    signed_headers,
    signer_of,
)

BODY = '{"type":"alert.created","data":{"account_id":"Zürich"}}'.encode()

Verify = Callable[[str, bytes, dict[str, str]], Any]


def by_standardwebhooks(secret: str, body: bytes, headers: dict[str, str]) -> Any:
    return standardwebhooks.Webhook(secret).verify(body, headers)


def by_svix(secret: str, body: bytes, headers: dict[str, str]) -> Any:
    return svix.webhooks.Webhook(secret).verify(body, headers)


LIBRARIES = pytest.mark.parametrize("verify", [by_standardwebhooks, by_svix])
REFUSALS = (
    standardwebhooks.WebhookVerificationError,
    svix.webhooks.WebhookVerificationError,
)


def headers_of(*secrets: str, age_seconds: int = 0) -> dict[str, str]:
    now = int(time.time()) - age_seconds
    return signed_headers("msg_1", now, BODY, [signer_of(secret) for secret in secrets])


@LIBRARIES
def test_the_reference_libraries_accept_a_signature(verify: Verify) -> None:
    secret = new_secret()

    verify(secret, BODY, headers_of(secret))  # raises otherwise


@LIBRARIES
def test_while_a_secret_rotates_receivers_with_either_accept(verify: Verify) -> None:
    new, old, private = new_secret(), new_secret(), new_key_pair()[0]
    headers = headers_of(private, new, old)

    assert headers["webhook-signature"].count(" ") == 2
    verify(new, BODY, headers)
    verify(old, BODY, headers)
    with pytest.raises(REFUSALS):
        verify(new_secret(), BODY, headers)


@LIBRARIES
@pytest.mark.parametrize("changed", ["body", "webhook-id", "webhook-timestamp", "old"])
def test_whatever_is_changed_the_signature_no_longer_fits(verify: Verify, changed: str) -> None:
    secret = new_secret()
    headers = headers_of(secret, age_seconds=3600 if changed == "old" else 0)
    body = BODY
    match changed:
        case "body":
            body = BODY.replace(b"alert", b"Alert")
        case "webhook-id":
            headers["webhook-id"] = "msg_2"
        case "webhook-timestamp":
            headers["webhook-timestamp"] = str(int(headers["webhook-timestamp"]) + 1)

    with pytest.raises(REFUSALS):
        verify(secret, body, headers)


def test_the_public_key_verifies_a_v1a_signature() -> None:
    private, public = new_key_pair()
    headers = headers_of(private)
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix("whpk_")))
    version, _, signature = headers["webhook-signature"].partition(",")
    signed = f"msg_1.{headers['webhook-timestamp']}.".encode() + BODY

    assert (version, public[:5]) == ("v1a", "whpk_")
    key.verify(base64.b64decode(signature), signed)
    with pytest.raises(InvalidSignature):
        key.verify(base64.b64decode(signature), signed + b" ")


def test_a_private_key_may_hold_its_public_key() -> None:
    private, public = new_key_pair()
    seed = base64.b64decode(private.removeprefix("whsk_"))
    both = seed + base64.b64decode(public.removeprefix("whpk_"))

    signer = signer_of("whsk_" + base64.b64encode(both).decode())

    assert isinstance(signer, Ed25519Signer)
    assert signer.public_key == public


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("whpk_AAAA", "public key"),
        ("hunter2hunter2hunter2hunter2", "begin with whsec_"),
        ("whsec_aHVudGVyMg==", "has 7 bytes"),
        ("whsec_" + base64.b64encode(bytes(65)).decode(), "has 65 bytes"),
        ("whsec_hunter2***", "not base64"),
        ("whsk_aHVudGVyMg==", "no Ed25519 key"),
        ("whsk_" + base64.b64encode(bytes(64)).decode(), "do not belong together"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_quoted(secret: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        signer_of(secret)

    assert secret.rpartition("_")[2][:7] not in str(error.value)
