"""Every setting of the running system, with its unit and default.

A setting comes, in this order, from the environment (``RECUR_`` and the upper-case name),
from a TOML file (``--config FILE`` or ``RECUR_CONFIG``; keys are the lower-case names),
or from the default below. ``recur settings`` prints all of them; secrets are masked.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pipeline.errors import SettingsError

SHIPPED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "default.safetensors"
CONFIG_VARIABLE = "RECUR_CONFIG"


def _topic_name(name: str) -> str:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    if not name or len(name) > 200 or not set(name) <= allowed:
        raise ValueError("a topic name has 1 to 200 of the characters a-z A-Z 0-9 . _ -")
    return name


TopicName = Annotated[str, AfterValidator(_topic_name)]


class Settings(BaseSettings):
    """Settings of worker, demo, replay and tools.

    Raises:
        SettingsError: from :func:`load_settings`, naming each wrong setting.
    """

    model_config = SettingsConfigDict(
        env_prefix="RECUR_", extra="forbid", frozen=True, allow_inf_nan=False
    )

    # Kafka
    kafka_bootstrap: str = Field(
        "127.0.0.1:9092", description="broker addresses, host:port, comma-separated"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism, with a SASL_ protocol"
    )
    kafka_sasl_username: str | None = Field(None, description="SASL user")
    kafka_sasl_password: SecretStr | None = Field(None, description="SASL password")
    kafka_ssl_cafile: Path | None = Field(
        None, description="PEM file of the authorities that signed the brokers' certificates"
    )
    kafka_ssl_certfile: Path | None = Field(None, description="PEM file of the client certificate")
    kafka_ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    kafka_ssl_key_password: SecretStr | None = Field(None, description="password of that key")
    kafka_group: str = Field("recur", min_length=1, description="consumer group of the workers")
    kafka_session_timeout_seconds: float = Field(
        10.0, ge=1, le=300, description="a silent worker loses its partitions after this, seconds"
    )
    kafka_commit_interval_seconds: float = Field(
        1.0, ge=0.05, le=60, description="between two commits of acked offsets, seconds"
    )
    kafka_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where a group without committed offsets begins"
    )
    kafka_replication_factor: int = Field(
        1, ge=1, le=9, description="replicas of a topic that Recur creates"
    )
    transactional: bool = Field(
        False,
        description="whether scores, alerts and offsets are committed together, in Kafka"
        " transactions; who reads with read_committed then sees each score once",
    )
    kafka_compression: Literal["none", "gzip", "lz4", "snappy", "zstd"] = Field(
        "none", description="compression of published records"
    )

    # Topics
    topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,49}$", description="put before each topic's name"
    )
    transactions_topic: TopicName = Field("transactions", description="payments in")
    scores_topic: TopicName = Field("scores", description="a score for each transaction out")
    alerts_topic: TopicName = Field("alerts", description="scores at or over the threshold out")
    labels_topic: TopicName = Field("labels", description="truths that arrive later, in")
    dead_letter_topic: TopicName = Field("dead-letter", description="rejected records out")
    partitions: int = Field(
        8, ge=1, le=10_000, description="partitions of each topic that Recur creates"
    )
    log_retention_days: float = Field(
        30.0, gt=0, le=36_500, description="retention of topics that Recur creates, days"
    )
    on_new_log: Literal["stop", "begin"] = Field(
        "stop",
        description="where a topic was deleted and made again: stop, or begin its states from it",
    )
    topic_missing_seconds: float = Field(
        60.0,
        ge=1,
        le=86_400,
        description="a topic that is deleted while workers run is waited for, then they end,"
        " seconds",
    )

    # Redis
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,  # a password may stand in the address
        description="redis:// or rediss:// (TLS) address; of any node with redis_cluster",
    )
    redis_cluster: bool = Field(False, description="whether the address is a Redis Cluster's")
    redis_username: str | None = Field(None, description="ACL user")
    redis_password: SecretStr | None = Field(None, description="password of that user")
    redis_ssl_cafile: Path | None = Field(
        None, description="PEM file of the authorities that signed the server's certificate"
    )
    redis_ssl_certfile: Path | None = Field(None, description="PEM file of the client certificate")
    redis_ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    redis_timeout_seconds: float = Field(
        5.0, gt=0, le=60, description="one Redis call may take this long, seconds"
    )
    key_prefix: str = Field("recur", pattern=r"^[A-Za-z0-9_.-]+$", description="begins every key")

    # Scoring
    checkpoint: Path = Field(SHIPPED_CHECKPOINT, description="model file (safetensors)")
    state_ttl_days: float = Field(
        30.0,
        gt=0,
        le=36_500,
        description="an account silent for longer starts anew, days of record time",
    )
    future_limit_seconds: float = Field(
        86_400.0, gt=0, description="a timestamp further past its record's is rejected, seconds"
    )
    review_threshold: float | None = Field(
        None, ge=0, le=1, description="score from which on to alert; else the checkpoint's"
    )
    decline_threshold: float | None = Field(
        None, ge=0, le=1, description="score from which on to decline; else the checkpoint's"
    )
    checkpoint_look_seconds: float = Field(
        5.0,
        ge=0.1,
        le=3600,
        description="between two looks at the checkpoint file for new thresholds, seconds",
    )
    micro_batch_max: int = Field(
        2048, ge=1, le=65_536, description="most records in one poll, records"
    )
    cached_states_max: int = Field(
        50_000, ge=0, description="states that a worker holds in memory (0.6 kB each), states"
    )
    cached_merchants_max: int = Field(
        50_000,
        ge=0,
        le=10_000_000,
        description="merchants whose features a worker holds in memory (0.3 kB each), merchants",
    )
    merchant_counts: bool = Field(
        True,
        description="whether to count transactions and labels in merchants' profiles; off for a"
        " second model on the same Redis",
    )
    dead_letter_value_max_bytes: int = Field(
        65_536, ge=0, le=900_000, description="longer rejected values are truncated, bytes"
    )

    # Operations
    http_host: str = Field("127.0.0.1", description="address of /metrics, /live and /ready")
    http_port: int = Field(9100, ge=0, le=65_535, description="their port; 0 takes a free one")
    watchdog_seconds: float = Field(
        60.0, gt=0, description="records wait and nothing moves for this long: exit, seconds"
    )
    startup_timeout_seconds: float = Field(
        10.0, gt=0, le=600, description="how long to wait for broker and Redis at start, seconds"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log line to write"
    )
    log_format: Literal["json", "text"] = Field("json", description="form of a log line")

    @model_validator(mode="after")
    def _belong_together(self) -> Settings:
        if self.kafka_security_protocol.startswith("SASL") and not (
            self.kafka_sasl_username and self.kafka_sasl_password
        ):
            raise ValueError(
                "kafka_security_protocol needs kafka_sasl_username and kafka_sasl_password"
            )
        if "@" in self.kafka_bootstrap:
            raise ValueError(
                "kafka_bootstrap has host:port alone; who logs in is kafka_sasl_username"
            )
        if not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("redis_url must begin with redis://, rediss:// or unix://")
        if not _is_address(self.redis_url):
            raise ValueError(
                "redis_url has no host, or a port that is no number; a password with one of the"
                " characters / ? # @ goes into redis_password"
            )
        self._use_what_is_set()
        if (
            self.review_threshold is not None
            and self.decline_threshold is not None
            and self.decline_threshold < self.review_threshold
        ):
            raise ValueError("decline_threshold must not be under review_threshold")
        return self

    def _use_what_is_set(self) -> None:
        """A certificate that nobody asks for would mean that there is no TLS where one thinks so.

        Raises:
            ValueError: there are TLS settings, and TLS is not on.
        """
        for service, is_on, how in (
            ("kafka", self.kafka_security_protocol.endswith("SSL"), "kafka_security_protocol"),
            ("redis", self.redis_url.startswith("rediss://"), "a redis_url of rediss://"),
        ):
            names = [f"{service}_ssl_{name}" for name in ("cafile", "certfile", "keyfile")]
            there = [name for name in names if getattr(self, name)]
            if there and not is_on:
                raise ValueError(f"{', '.join(there)} is set, but TLS is not on: set {how}")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over environment over file over defaults."""
        file = os.environ.get(CONFIG_VARIABLE)
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if file:
            sources += (TomlConfigSettingsSource(settings_cls, toml_file=Path(file)),)
        return sources

    def topic(
        self, name: Literal["transactions", "scores", "alerts", "labels", "dead_letter"]
    ) -> str:
        """Full name of a topic, prefix included."""
        return self.topic_prefix + str(getattr(self, f"{name}_topic"))

    def kafka_client_options(self) -> dict[str, Any]:
        """Connection arguments that aiokafka's consumer, producer and admin client share.

        Raises:
            SettingsError: as :meth:`kafka_ssl_context`.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": self.kafka_bootstrap,
            "security_protocol": self.kafka_security_protocol,
        }
        if self.kafka_security_protocol.startswith("SASL"):
            assert self.kafka_sasl_password is not None
            options |= {
                "sasl_mechanism": self.kafka_sasl_mechanism,
                "sasl_plain_username": self.kafka_sasl_username,
                "sasl_plain_password": self.kafka_sasl_password.get_secret_value(),
            }
        if self.kafka_security_protocol.endswith("SSL"):
            options["ssl_context"] = self.kafka_ssl_context()
        return options

    def kafka_ssl_context(self) -> ssl.SSLContext:
        """TLS context for the brokers, with the client's certificate where one is set.

        Raises:
            SettingsError: a file is missing or not what it should be; it names the setting.
        """
        return self._ssl_context("kafka", self.kafka_ssl_key_password)

    def _ssl_context(
        self, service: Literal["kafka", "redis"], key_password: SecretStr | None = None
    ) -> ssl.SSLContext:
        cafile, certfile, keyfile = (
            getattr(self, f"{service}_ssl_{name}") for name in ("cafile", "certfile", "keyfile")
        )
        try:
            context = ssl.create_default_context(cafile=cafile)
        except OSError as error:  # ssl's own errors are of this kind
            name = f"{service}_ssl_cafile"
            raise SettingsError(f"{_named(name)}: no certificates in {cafile} ({error})") from error
        if certfile:
            try:
                # Without a password OpenSSL would ask the terminal for one.
                password = key_password.get_secret_value() if key_password else ""
                context.load_cert_chain(certfile, keyfile, password)
            except OSError as error:
                names = [f"{service}_ssl_{name}" for name in ("certfile", "keyfile")]
                names += [f"{service}_ssl_key_password"] * (service == "kafka")
                raise SettingsError(
                    f"{', '.join(map(_named, names))}: no certificate with its key in {certfile}"
                    f"{f' and {keyfile}' if keyfile else ''} ({error})"
                ) from error
        return context

    def redis_client_options(self) -> dict[str, Any]:
        """Keyword arguments of ``redis.asyncio``'s ``from_url`` besides the address.

        Raises:
            SettingsError: a file is missing or not what it should be; it names the setting.
        """
        options: dict[str, Any] = {
            "socket_timeout": self.redis_timeout_seconds,
            "socket_connect_timeout": self.redis_timeout_seconds,
        }
        if self.redis_username:
            options["username"] = self.redis_username
        if self.redis_password:
            options["password"] = self.redis_password.get_secret_value()
        if self.redis_url.startswith("rediss://"):
            self._ssl_context("redis")  # so that a wrong file is told at once, by its setting
            for name in ("cafile", "certfile", "keyfile"):
                path = getattr(self, f"redis_ssl_{name}")
                if path:
                    options["ssl_ca_certs" if name == "cafile" else f"ssl_{name}"] = str(path)
        return options


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; ``overrides`` win over environment and file.

    Raises:
        SettingsError: one line for each wrong setting, naming it and what it must be.
    """
    file = os.environ.get(CONFIG_VARIABLE)
    if file and not Path(file).is_file():
        raise SettingsError(f"{CONFIG_VARIABLE}: there is no file {file}")
    known = {f"RECUR_{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    unknown = sorted(name for name in os.environ if name.startswith("RECUR_") and name not in known)
    if unknown:
        raise SettingsError(
            f"{', '.join(unknown)}: no such setting; `recur settings` lists them all"
        )
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_complaints(error))) from None
    except ValueError as error:  # the TOML file is not TOML
        raise SettingsError(f"{file}: {error}") from None


def _named(name: str) -> str:
    return f"{name} (RECUR_{name.upper()})"


def _is_address(url: str) -> bool:
    """Whether a Redis address has a host and, if any, a port that is a number."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return True
        rest = parts.path + parts.query + parts.fragment
        return bool(parts.hostname) and parts.port != 0 and "@" not in rest
    except ValueError:
        return False


def redis_address(url: str) -> str:
    """A Redis address as it may be shown: without user, password and what options there are.

    >>> redis_address("rediss://recur:secret@redis.example:6379/0?password=secret")
    'rediss://**********@redis.example:6379/0?**********'
    """
    head, _, tail = url.rpartition("@")
    place, _, query = tail.partition("?")
    shown = f"{head.partition('://')[0]}://**********@{place}" if head else place
    return f"{shown}?**********" if query else shown


def _complaints(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_input=False, include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "no such setting; `recur settings` lists them all"
        yield f"{_named(name)}: {message}" if name else message


def describe(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Rows of (name, value, default, description) for ``recur settings``; secrets masked."""
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        yield name, _shown(name, value), _shown(name, field.default), field.description or ""


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "redis_url":  # a password may stand in the address
        return redis_address(value)
    if name == "checkpoint" and value == SHIPPED_CHECKPOINT:
        return "(the shipped one)"
    return str(value)
