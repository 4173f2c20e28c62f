"""JWTs of an issuer: forged, foreign and stale ones are refused, and its keys are cached."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pipeline.errors import SettingsError
from pipeline.gateway.authentication import Authenticator
from pipeline.gateway.jwt_tokens import (
    JWKS_MAX_BYTES,
    JWKS_RETRY_SECONDS,
    JWKS_SECONDS,
    JWKS_STALE_SECONDS,
    InvalidJwtError,
    JwksUnavailableError,
    JwtVerifier,
    _read_source,
)
from pipeline.gateway.problems import Problem
from pipeline.settings import Settings, load_settings
from tests.fakes.clock import Clock

ISSUER, AUDIENCE = "https://issuer.example", "recur"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
KEYS: dict[str, tuple[str, Any]] = {"r": ("RS256", RSA), "e": ("ES256", EC), "d": ("EdDSA", ED)}


def jwks(*names: str) -> bytes:
    found = []
    for name in names:
        algorithm, key = KEYS[name]
        text = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key())
        found.append({**json.loads(text), "kid": name, "use": "sig"})
    return json.dumps({"keys": found}).encode()


def settings_of(**changes: Any) -> Settings:
    return load_settings(
        gateway_jwt_issuer=ISSUER,
        gateway_jwt_audience=AUDIENCE,
        gateway_jwt_jwks="https://issuer.example/jwks",
        **changes,
    )


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    found = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "ann@bank.example", "exp": now + 600,
        "scope": "openid score read root",
    } | changes  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def token(name: str = "r", kid: str | None = "", **changes: Any) -> str:
    algorithm, key = KEYS[name]
    headers = {} if kid is None else {"kid": kid or name}
    return jwt.encode(claims(**changes), key, algorithm, headers)


def verifier(*names: str, **changes: Any) -> JwtVerifier:
    return JwtVerifier(settings_of(**changes), lambda: jwks(*names))


def test_tokens_of_each_kind_of_signature_are_accepted() -> None:
    async def run() -> None:
        found = verifier("r", "e", "d")
        for name in KEYS:
            principal = await found.verify(token(name))
            assert (principal.kind, principal.id) == ("jwt", "ann@bank.example")
            assert principal.scopes == {"score", "read"}
            assert principal.tenant is None
            assert "ann" not in principal.label
        listed = await found.verify(token(scope=["label", 5, "x"]))
        assert listed.scopes == {"label"}
        assert (await found.verify(token(scope=None))).scopes == frozenset()
        only = verifier("e")
        assert (await only.verify(token("e", kid=None))).id == "ann@bank.example"

    asyncio.run(run())


def forged(name: str) -> str:
    """A token that must not be accepted."""
    now = int(time.time())
    public = RSA.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    head, payload, signature = token().split(".")
    changed = base64.urlsafe_b64encode(json.dumps(claims(sub="eve")).encode()).rstrip(b"=").decode()
    none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"r"}').rstrip(b"=").decode()
    symmetric = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"r"}').rstrip(b"=").decode()
    signed = jwt.get_algorithm_by_name("HS256").sign(f"{symmetric}.{payload}".encode(), public)
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return {
        "expired": token(exp=now - 60),
        "early": token(nbf=now + 600),
        "no expiry": token(exp=None),
        "issuer": token(iss="https://other.example"),
        "audience": token(aud="other"),
        "no audience": token(aud=None),
        "no subject": token(sub=None),
        "long subject": token(sub="x" * 256),
        "changed": f"{head}.{changed}.{signature}",
        "none": f"{none}.{payload}.",
        "public key as a secret": (
            f"{symmetric}.{payload}.{base64.urlsafe_b64encode(signed).rstrip(b'=').decode()}"
        ),
        "other key": jwt.encode(claims(), other, "RS256", {"kid": "r"}),
        "unknown kid": token(kid="z"),
        "no kid": token(kid=None),
        "key of another kind": token("e", kid="r"),
        "long": token(sub="x" * 10_000),
        "dots": "..",
        "deep": base64.urlsafe_b64encode(b"[" * 3_000).decode().rstrip("=") + ".e30.x",
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "expired", "early", "no expiry", "issuer", "audience", "no audience", "no subject",
        "long subject", "changed", "none", "public key as a secret", "other key", "unknown kid",
        "no kid", "key of another kind", "long", "dots", "deep",
    ],
)  # fmt: skip
def test_a_token_that_proves_nothing_is_refused(name: str) -> None:
    with pytest.raises(InvalidJwtError):
        asyncio.run(verifier("r", "e").verify(forged(name)))


def test_a_tenant_claim_must_be_there_once_it_is_configured() -> None:
    async def run() -> None:
        found = verifier("r", gateway_jwt_tenant_claim="org")
        assert (await found.verify(token(org="acme-"))).tenant == "acme-"
        for wrong in (None, "", "acme", 5, ["acme-"]):
            with pytest.raises(InvalidJwtError, match="tenant"):
                await found.verify(token(org=wrong))

    asyncio.run(run())


def test_the_keys_are_cached_and_unknown_ones_do_not_make_a_flood() -> None:
    async def run() -> None:
        clock, reads, known = Clock(), 0, jwks("r")

        def read() -> bytes:
            nonlocal reads
            reads += 1
            if known == b"away":
                raise OSError("away")
            return known

        found = JwtVerifier(settings_of(), read, clock)
        await asyncio.gather(*(found.verify(token()) for _ in range(5)))
        for _ in range(5):
            clock.now_seconds += JWKS_RETRY_SECONDS / 10
            with pytest.raises(InvalidJwtError):
                await found.verify(token("e"))
        assert reads == 1

        known = jwks("r", "e")  # the issuer rotates
        clock.now_seconds += JWKS_RETRY_SECONDS
        await found.verify(token("e"))
        assert reads == 2

        known = b"away"
        clock.now_seconds += JWKS_SECONDS + 1
        await found.verify(token("e"))
        assert reads == 3
        clock.now_seconds += JWKS_STALE_SECONDS
        with pytest.raises(JwksUnavailableError):
            await found.verify(token("e"))

        known = jwks("e")
        clock.now_seconds += JWKS_RETRY_SECONDS
        await found.verify(token("e"))
        with pytest.raises(InvalidJwtError):
            await found.verify(token("r"))  # taken away by the issuer

    asyncio.run(run())


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "AAAA", "kid": "r"}]}',
     b"[" * 5_000, b'{"keys": [5]}', b'{"keys": 5}', b"null", b'{"keys": [{"kty": "RSA"}]}'],
)  # fmt: skip
def test_a_key_set_that_cannot_be_used_closes_the_door(answer: bytes) -> None:
    with pytest.raises(JwksUnavailableError):
        asyncio.run(JwtVerifier(settings_of(), lambda: answer).verify(token()))


def test_refused_tokens_become_problems() -> None:
    async def problem(found: JwtVerifier, text: str) -> Problem:
        headers = [(b"authorization", b"Bearer " + text.encode())]
        with pytest.raises(Problem) as caught:
            await Authenticator(None, found).authenticate(headers, "id")  # type: ignore[arg-type]
        return caught.value

    def away() -> bytes:
        raise OSError

    refused = asyncio.run(problem(verifier("r"), token(exp=1)))
    assert (refused.kind.status, refused.detail) == (401, "the credentials have expired")
    unchecked = asyncio.run(problem(JwtVerifier(settings_of(), away), token()))
    assert (unchecked.kind.status, unchecked.kind.name) == (503, "identity-unavailable")


def test_a_file_of_keys_is_read_within_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks("r"))
    assert _read_source(str(file)) == jwks("r")
    file.write_bytes(b" " * (JWKS_MAX_BYTES + 1))
    with pytest.raises(ValueError, match="too large"):
        _read_source(str(file))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gateway_jwt_audience": ""}, "RECUR_GATEWAY_JWT_AUDIENCE"),
        ({"gateway_jwt_issuer": ""}, "RECUR_GATEWAY_JWT_ISSUER"),
        ({"gateway_jwt_jwks": "http://issuer.example/jwks"}, "https"),
        ({"gateway_jwt_algorithms": "RS256,HS256"}, "RECUR_GATEWAY_JWT_ALGORITHMS"),
        ({"gateway_jwt_algorithms": "none"}, "RECUR_GATEWAY_JWT_ALGORITHMS"),
        ({"gateway_jwt_algorithms": ""}, "RECUR_GATEWAY_JWT_ALGORITHMS"),
    ],
)
def test_settings_that_would_open_the_door_are_refused(changes: dict[str, str], says: str) -> None:
    given = {
        "gateway_jwt_issuer": ISSUER,
        "gateway_jwt_audience": AUDIENCE,
        "gateway_jwt_jwks": "https://issuer.example/jwks",
    } | changes
    with pytest.raises(SettingsError, match=says):
        load_settings(**given)


@pytest.mark.slow
def test_pyjwt_is_imported_only_where_an_issuer_is_configured() -> None:
    """The extra `jwt` is optional: a gateway without an issuer starts without it."""
    script = """if True:
        import json, sys
        from pipeline.checkpoint import load_checkpoint
        from pipeline.gateway import process
        from pipeline.gateway.app import make_app
        from pipeline.gateway.service import Gateway
        from pipeline.settings import load_settings

        settings = load_settings(**json.loads(sys.argv[1]))
        make_app(Gateway(settings, load_checkpoint(settings)))
        print("jwt" in sys.modules)
    """
    names = ("gateway_jwt_issuer", "gateway_jwt_audience", "gateway_jwt_jwks")
    configured = {name: getattr(settings_of(), name) for name in names}
    for settings, imported in (({}, "False"), (configured, "True")):
        printed = subprocess.run(
            [sys.executable, "-c", script, json.dumps(settings)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert printed.stdout.strip() == imported, printed.stderr
