"""The file of endpoints (RECUR_WEBHOOKS_FILE): where alerts go, which ones, and with which secrets.

    [[endpoints]]
    name = "cases"
    url = "https://cases.example/hooks/recur"
    secrets = [{ env = "CASES_SECRET" }, { file = "/run/secrets/cases-old" }]
    decisions = ["decline"]
    min_score = 0.9
    categories = ["5411"]
    allow_networks = ["10.1.0.0/16"]

The whole file is checked before any of it counts.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import SettingsError
from pipeline.settings import Settings
from pipeline.webhooks.addresses import AddressPolicy, Network
from pipeline.webhooks.signing import Signer, signer_of

ENDPOINTS_MAX = 100
"""Most endpoints in the file. Each has a consumer, and a value of each metric."""

SECRETS_MAX = 5
"""Most secrets of an endpoint: each is a signature in the header."""

FILE_MAX_BYTES = 1 << 20
CATEGORIES_MAX = 1000
NETWORKS_MAX = 100


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _SecretSource(_Strict):
    """The place of a secret: exactly one of a variable and a file."""

    env: str | None = None
    file: Path | None = None

    @model_validator(mode="after")
    def _one_place(self) -> _SecretSource:
        if (self.env is None) == (self.file is None):
            raise ValueError("a secret has either env or file")
        return self


class _Row(_Strict):
    """An endpoint as the file has it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    url: Annotated[str, Field(max_length=2048)]
    secrets: Annotated[list[str | _SecretSource], Field(min_length=1, max_length=SECRETS_MAX)]
    decisions: list[Literal["review", "decline"]] = []
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    categories: Annotated[list[str], Field(max_length=CATEGORIES_MAX)] = []
    allow_networks: Annotated[list[str], Field(max_length=NETWORKS_MAX)] = []
    ca_file: Path | None = None
    disabled: bool = False
    start: Literal["latest", "earliest"] = "latest"

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ValueError("is no URL") from None
        if parts.scheme not in ("https", "http") or not host:
            raise ValueError("must be https://host/path")
        if parts.username is not None or parts.password is not None:
            raise ValueError("must not hold a user or a password: the signature is the proof")
        if parts.fragment or any(c <= " " or c == "\x7f" for c in url):
            raise ValueError("must not hold a fragment, a space or a control character")
        return url

    @model_validator(mode="after")
    def _check_encrypted(self) -> _Row:
        if self.url.startswith("http:") and not self.allow_networks:
            raise ValueError(
                "its url must be https: http is only for hosts in networks that allow_networks"
                " names"
            )
        return self


class _File(_Strict):
    endpoints: Annotated[list[_Row], Field(max_length=ENDPOINTS_MAX)] = []


@dataclass(frozen=True)
class EventFilter:
    """The alerts that an endpoint gets; an empty set permits all.

    Attributes:
        decisions: decisions of the alerts.
        min_score: lowest score.
        categories: categories of the transactions (merchant category codes, or text).
    """

    decisions: frozenset[str] = frozenset()
    min_score: float = 0.0
    categories: frozenset[str] = frozenset()

    def permits(self, decision: str, score: float) -> bool:
        """Tell whether decision and score pass."""
        return score >= self.min_score and (not self.decisions or decision in self.decisions)


@dataclass(frozen=True)
class Endpoint:
    """One destination of alerts.

    Attributes:
        name: its name, in metrics, logs, and the name of its consumer group.
        url: address of the receiver. No log shows it: it may hold a token.
        signers: secrets, in the order of the file.
        filter: the alerts that it gets.
        allowed: networks that are permitted although they are not public.
        ca_pem: the authorities that it trusts, instead of the system's.
        is_disabled: whether the file disables it. It then keeps its position.
        start: where it begins without a position.
    """

    name: str
    url: str = field(repr=False)
    signers: Sequence[Signer] = field(repr=False, compare=False)
    secrets: tuple[str, ...] = field(repr=False)
    filter: EventFilter = EventFilter()
    allowed: tuple[Network, ...] = ()
    ca_pem: str | None = field(default=None, repr=False)
    is_disabled: bool = False
    start: Literal["latest", "earliest"] = "latest"

    @property
    def policy(self) -> AddressPolicy:
        """Addresses that its connections may lead to."""
        return AddressPolicy(self.allowed, self.url.startswith("https:"))

    def tls_context(self) -> ssl.SSLContext:
        """Make the TLS context of its connections: they verify the certificate and the host."""
        return ssl.create_default_context(cadata=self.ca_pem)


def load_endpoints(path: Path, environment: Mapping[str, str] = os.environ) -> dict[str, Endpoint]:
    """Read the file, and the secrets that it names; return the endpoints by name.

    Raises:
        SettingsError: the file cannot be read or is wrong. Each line names an endpoint and a
            field, and never a secret.
    """
    rows = _read(path)
    names = [row.name for row in rows]
    problems = [
        f"endpoint {n!r} is there twice" for n in dict.fromkeys(names) if names.count(n) > 1
    ]
    endpoints: dict[str, Endpoint] = {}
    for row in rows:
        try:
            endpoints[row.name] = _endpoint(row, path.parent, environment)
        except ValueError as error:
            problems.append(f"endpoint {row.name!r}: {error}")
    if problems:
        raise _wrong(path, problems)
    return endpoints


def configured_endpoints(settings: Settings) -> tuple[Path, dict[str, Endpoint]]:
    """Read the endpoints of the settings; return the file and the endpoints by name.

    Raises:
        SettingsError: no file is set, or it is wrong.
    """
    if settings.webhooks_file is None:
        raise SettingsError(
            "webhooks_file (RECUR_WEBHOOKS_FILE) is not set: name the TOML file of endpoints;"
            " docs/webhooks.md shows one"
        )
    return settings.webhooks_file, load_endpoints(settings.webhooks_file)


def named_endpoint(endpoints: Mapping[str, Endpoint], name: str) -> Endpoint:
    """Return an endpoint by its name.

    Raises:
        SettingsError: there is none; the message lists the names.
    """
    if name not in endpoints:
        raise SettingsError(
            f"there is no endpoint {name!r}: RECUR_WEBHOOKS_FILE has"
            f" {', '.join(endpoints) or 'none'}"
        )
    return endpoints[name]


def _read(path: Path) -> list[_Row]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise _wrong(path, [f"cannot be read ({error.strerror})"]) from error
    if len(content) > FILE_MAX_BYTES:
        raise _wrong(path, [f"has over {FILE_MAX_BYTES} bytes"])
    try:
        return _File.model_validate(tomllib.loads(content.decode())).endpoints
    except ValidationError as error:
        raise _wrong(path, _complaints(error)) from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise _wrong(path, [str(error)]) from None


def _complaints(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_input=False, include_url=False):
        path = [p for p in problem["loc"] if p not in ("endpoints", "str", "_SecretSource")]
        place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in path)
        text = problem["msg"].removeprefix("Value error, ")
        yield f"endpoint {place}: {text}" if place else text


def _wrong(path: Path, problems: Sequence[str] | Iterator[str]) -> SettingsError:
    return SettingsError("\n".join(f"{path}: {problem}" for problem in problems))


def _endpoint(row: _Row, folder: Path, environment: Mapping[str, str]) -> Endpoint:
    secrets = tuple(_secret(source, folder, environment) for source in row.secrets)
    signers = []
    for number, secret in enumerate(secrets, 1):
        try:
            signers.append(signer_of(secret))
        except ValueError as error:
            raise ValueError(f"secret {number} {error}") from None
    endpoint = Endpoint(
        name=row.name,
        url=row.url,
        signers=signers,
        secrets=secrets,
        filter=EventFilter(frozenset(row.decisions), row.min_score, frozenset(row.categories)),
        allowed=tuple(_network(text) for text in row.allow_networks),
        ca_pem=None if row.ca_file is None else _text_of(folder / row.ca_file, "ca_file"),
        is_disabled=row.disabled,
        start=row.start,
    )
    if endpoint.ca_pem is not None:
        try:
            endpoint.tls_context()
        except (OSError, ValueError):
            raise ValueError(f"ca_file: no certificates in {row.ca_file}") from None
    return endpoint


def _secret(source: str | _SecretSource, folder: Path, environment: Mapping[str, str]) -> str:
    if isinstance(source, str):
        return source.strip()
    if source.env is not None:
        if source.env not in environment:
            raise ValueError(f"the environment has no variable {source.env}")
        return environment[source.env].strip()
    assert source.file is not None
    return _text_of(folder / source.file, "the file of a secret")


def _text_of(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(FILE_MAX_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}, {path}, cannot be read ({type(error).__name__})") from error


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"allow_networks: {error}") from None
