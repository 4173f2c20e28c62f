"""All settings of the running system, with unit and default.

A setting comes, in this order, from the environment (``RECUR_`` and the upper-case name),
from a TOML file (``--config FILE`` or ``RECUR_CONFIG``; keys are the lower-case names),
or from the default below. ``recur settings`` prints all of them; secrets are masked.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from model.units import DAY_SECONDS, HOUR_SECONDS
from pipeline.errors import SettingsError

if TYPE_CHECKING:  # it imports aiokafka
    from pipeline.oauth_tokens import OAuthTokens

SHIPPED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "default.safetensors"
CONFIG_VARIABLE = "RECUR_CONFIG"

RENAMED = {
    "cached_merchants_max": "merchant_cache_size",
    "cached_states_max": "state_cache_size",
    "checkpoint_look_seconds": "checkpoint_poll_interval_seconds",
    "future_limit_seconds": "max_timestamp_ahead_seconds",
    "kafka_bootstrap": "kafka_bootstrap_servers",
    "kafka_group": "kafka_group_id",
    "kafka_offset_reset": "kafka_auto_offset_reset",
    "key_prefix": "redis_key_prefix",
    "merchant_counts": "update_merchant_profiles",
    "partitions": "topic_partitions",
    "transactional": "processing_guarantee",
}
"""Settings by their names before version 0.2.0."""

REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
SENTINEL_PORT = 26379

# What Kubernetes sets in each container for a service named recur, recur-redis or recur-http.
_KUBERNETES_NAME = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$"
)
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")

log = logging.getLogger(__name__)


def _topic_name(name: str) -> str:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    if not name or len(name) > 200 or not set(name) <= allowed:
        raise ValueError("a topic name has 1 to 200 of the characters a-z A-Z 0-9 . _ -")
    return name


JWT_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Signatures of JWTs with a public key."""


TopicName = Annotated[str, AfterValidator(_topic_name)]


class _WithoutKubernetes(PydanticBaseSettingsSource):
    """The environment without variables of Kubernetes: RECUR_HTTP_PORT=tcp://10.0.0.1:9100."""

    def __init__(
        self, settings_cls: type[BaseSettings], environment: PydanticBaseSettingsSource
    ) -> None:
        super().__init__(settings_cls)
        self._environment = environment

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the environment's value."""
        return self._environment.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        """Return the values by setting."""
        return {
            name: value
            for name, value in self._environment().items()
            if not (isinstance(value, str) and _is_kubernetes_port(f"RECUR_{name.upper()}", value))
        }


@dataclass(frozen=True)
class SentinelAddress:
    """The parts of a ``redis+sentinel://`` address.

    Attributes:
        hosts: host and port of each Sentinel.
        master: the primary's name at the Sentinels.
        database: number of the primary's database.
        username, password: the primary's login, if the address has one.
    """

    hosts: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str | None
    password: str | None


class Settings(BaseSettings):
    """Settings of worker, demo, replay and tools.

    Raises:
        SettingsError: from :func:`load_settings`, naming each wrong setting.
    """

    model_config = SettingsConfigDict(
        env_prefix="RECUR_", extra="forbid", frozen=True, allow_inf_nan=False
    )

    # Kafka
    kafka_bootstrap_servers: str = Field(
        "127.0.0.1:9092", description="broker addresses, host:port, comma-separated"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="protocol of connections to the brokers"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism, with a SASL_ protocol"
    )
    kafka_sasl_username: str | None = Field(
        None, description="SASL user; with OAUTHBEARER the client's id"
    )
    kafka_sasl_password: SecretStr | None = Field(
        None, description="SASL password; with OAUTHBEARER the client's secret"
    )
    kafka_oauth_token_url: str | None = Field(
        None,
        pattern=r"^(https://|http://(127\.0\.0\.1|localhost)[:/])[^\s@]+$",
        description="token endpoint of the identity provider, for OAUTHBEARER (OAuth 2.0, client"
        " credentials); https:// unless it is on this machine",
    )
    kafka_oauth_scope: str | None = Field(None, description="scope to ask for a token; optional")
    kafka_oauth_cafile: Path | None = Field(
        None, description="PEM file of the authorities of the token endpoint; default: the system's"
    )
    kafka_ssl_cafile: Path | None = Field(
        None, description="PEM file of the authorities that signed the brokers' certificates"
    )
    kafka_ssl_certfile: Path | None = Field(None, description="PEM file of the client certificate")
    kafka_ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    kafka_ssl_key_password: SecretStr | None = Field(None, description="password of that key")
    kafka_group_id: str = Field("recur", min_length=1, description="consumer group of the workers")
    kafka_group_instance_id: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,249}$",
        description="this worker's own name in the group, another for each worker: one that is"
        " restarted within the session timeout gets its partitions back, and no other worker"
        " gives up its own. A worker that ends for good keeps its partitions until the timeout."
        " Empty: they move at once",
    )
    kafka_session_timeout_seconds: float = Field(
        10.0, ge=1, le=300, description="a silent worker loses its partitions after this, seconds"
    )
    kafka_commit_interval_seconds: float = Field(
        1.0, ge=0.05, le=60, description="time between two commits of acked offsets, seconds"
    )
    kafka_auto_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where a group without committed offsets begins"
    )
    kafka_replication_factor: int = Field(
        1, ge=1, le=9, description="replicas of a topic that Recur creates"
    )
    processing_guarantee: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once",
        description="exactly_once commits scores, alerts and offsets together, in Kafka"
        " transactions: a reader with read_committed then sees each score once",
    )
    kafka_compression: Literal["none", "gzip", "lz4", "snappy", "zstd"] = Field(
        "none", description="compression of published records"
    )
    kafka_linger_ms: int = Field(
        0,
        ge=0,
        le=1000,
        description="time that alerts and dead letters wait for more of their partition before"
        " they are sent, milliseconds; the micro-batch waits, too. Its scores are one batch for"
        " each partition and never wait",
    )

    # Topics
    topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,49}$", description="prefix of each topic's name"
    )
    transactions_topic: TopicName = Field("transactions", description="payments in")
    scores_topic: TopicName = Field("scores", description="a score for each transaction out")
    alerts_topic: TopicName = Field("alerts", description="scores at or over the threshold out")
    labels_topic: TopicName = Field("labels", description="labels of transactions, in")
    dead_letter_topic: TopicName = Field("dead-letter", description="rejected records out")
    audit_topic: TopicName = Field(
        "audit", description="labels and administrative acts by key, out"
    )
    audit_retention_days: float = Field(
        400.0, gt=0, le=36_500, description="retention of an audit topic that Recur creates, days"
    )
    topic_partitions: int = Field(
        8, ge=1, le=10_000, description="partitions of each topic that Recur creates"
    )
    log_retention_days: float = Field(
        30.0, gt=0, le=36_500, description="retention of topics that Recur creates, days"
    )
    on_new_log: Literal["stop", "begin"] = Field(
        "stop",
        description="if a topic was deleted and created again: stop, or begin its states from it",
    )
    topic_missing_seconds: float = Field(
        60.0,
        ge=1,
        le=DAY_SECONDS,
        description="workers wait this long for a topic that is deleted while they run, then end,"
        " seconds",
    )

    # Redis
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,  # the address may hold a password
        description="redis:// or rediss:// (TLS) address, of any node with redis_cluster; or"
        " redis+sentinel://sentinel-1:26379,sentinel-2:26379/master-name/0",
    )
    redis_cluster: bool = Field(False, description="whether the address is a Redis Cluster's")
    redis_username: str | None = Field(None, description="ACL user")
    redis_password: SecretStr | None = Field(None, description="password of that user")
    redis_sentinel_username: str | None = Field(None, description="ACL user of the Sentinels")
    redis_sentinel_password: SecretStr | None = Field(
        None, description="password of the Sentinels, if they have one"
    )
    redis_ssl_cafile: Path | None = Field(
        None, description="PEM file of the authorities that signed the server's certificate"
    )
    redis_ssl_certfile: Path | None = Field(None, description="PEM file of the client certificate")
    redis_ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    redis_timeout_seconds: float = Field(
        5.0, gt=0, le=60, description="longest duration of a Redis call, seconds"
    )
    redis_key_prefix: str = Field(
        "recur", pattern=r"^[A-Za-z0-9_.-]+$", description="begin of every key"
    )

    # Scoring
    answer_seconds: float = Field(
        86_400.0,
        ge=1,
        le=31_536_000,
        description="how long the answer to a transaction of a gateway is kept, seconds",
    )
    checkpoint: Path = Field(SHIPPED_CHECKPOINT, description="model file (safetensors)")
    state_ttl_days: float = Field(
        30.0,
        gt=0,
        le=36_500,
        description="the state of an account that is silent for longer expires, days",
    )
    max_timestamp_ahead_seconds: float = Field(
        float(DAY_SECONDS),
        gt=0,
        description="a timestamp further past its record's is rejected, seconds",
    )
    timestamp_tolerance_seconds: float = Field(
        300.0,
        ge=0,
        le=31_536_000,
        description="largest lead of an account's time over its record's if a clock is ahead,"
        " seconds; larger leads are counted (recur_event_time_skew_total)",
    )
    max_timestamp_age_seconds: float = Field(
        631_152_000.0,
        gt=0,
        description="a timestamp further before its record's is rejected, seconds; not in replays,"
        " warm-ups and records with the header recur-history",
    )
    id_conflicts: Literal["score", "reject"] = Field(
        "score",
        description="handling of a transaction whose id its account already had with other content",
    )
    review_threshold: float | None = Field(
        None, ge=0, le=1, description="lowest score of an alert; by default the checkpoint's"
    )
    decline_threshold: float | None = Field(
        None, ge=0, le=1, description="lowest score of a decline; by default the checkpoint's"
    )
    checkpoint_poll_interval_seconds: float = Field(
        5.0,
        ge=0.1,
        le=HOUR_SECONDS,
        description="time between two checks of the checkpoint file for new thresholds, seconds",
    )
    micro_batch_max: int = Field(
        2048, ge=1, le=65_536, description="most records in one poll, records"
    )
    state_cache_size: int = Field(
        50_000, ge=0, description="most states in a worker's memory (0.6 kB each), states"
    )
    merchant_cache_size: int = Field(
        50_000,
        ge=0,
        le=10_000_000,
        description="most merchants' features in a worker's memory (0.3 kB each), merchants",
    )
    update_merchant_profiles: bool = Field(
        True,
        description="whether to count transactions and labels in merchants' profiles; off for a"
        " second model on the same Redis",
    )
    cloudevents_alerts: bool = Field(
        True, description="whether alerts carry the headers of CloudEvents 1.0 (docs/events.md)"
    )
    cloudevents_scores: bool = Field(
        False,
        description="whether scores carry them too: 0.2 kB and 3 microseconds more for each score",
    )
    dead_letter_value_max_bytes: int = Field(
        65_536, ge=0, le=900_000, description="longer rejected values are truncated, bytes"
    )

    # Gateway
    gateway_host: str = Field("127.0.0.1", description="address of the gateway's HTTP API")
    gateway_port: int = Field(8080, ge=0, le=65_535, description="its port; 0 takes a free one")
    gateway_ssl_certfile: Path | None = Field(
        None, description="certificate chain of the gateway's own TLS, a PEM file; empty: none"
    )
    gateway_ssl_keyfile: Path | None = Field(
        None, description="its private key, a PEM file; empty: it stands in the certificate's file"
    )
    gateway_wait_ms: int = Field(
        1_000,
        ge=0,
        le=60_000,
        description="longest wait for a score before the answer is 202, milliseconds; a request's"
        " `Prefer: wait=` may ask for another one",
    )
    gateway_wait_max_ms: int = Field(
        20_000,
        ge=0,
        le=60_000,
        description="longest wait that a request may ask for, milliseconds; set it below"
        " gateway_request_timeout_seconds",
    )
    gateway_produce_seconds: float = Field(
        10.0,
        ge=0.5,
        le=120,
        description="a gateway gives up a record that the broker has not confirmed for this long,"
        " seconds; set it alike on all gateways",
    )
    gateway_max_transactions: int = Field(
        1_024, ge=1, le=100_000, description="most transactions that wait in a gateway at once"
    )
    gateway_batch_max: int = Field(
        200, ge=1, le=10_000, description="most transactions in a batch, or variants in a what-if"
    )
    gateway_search_records: int = Field(
        1_000,
        ge=0,
        le=100_000,
        description="last records of each partition in which a gateway looks for a score that has"
        " no answer key, and for an account's scores; 0: it looks for none",
    )

    # Access
    gateway_max_body_bytes: int = Field(
        1_048_576, ge=1_024, le=67_108_864, description="largest body of a request, bytes"
    )
    gateway_max_json_depth: int = Field(
        16, ge=4, le=100, description="most arrays and objects in each other in a body"
    )
    gateway_body_timeout_seconds: float = Field(
        10.0, gt=0, le=300, description="longest time until a body has arrived whole, seconds"
    )
    gateway_request_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=600,
        description="longest time of a request after its body has arrived, seconds",
    )
    gateway_max_concurrent_requests: int = Field(
        512, ge=1, le=100_000, description="most requests that a gateway works on at once"
    )
    gateway_max_open_requests: int = Field(
        2_048,
        ge=1,
        le=100_000,
        description="most requests in a gateway, with those whose body is still arriving",
    )
    gateway_default_rate: str = Field(
        "1000/s",
        pattern=r"^(none|\d{1,8}/\d{0,5}(s|min|h|day))$",
        description="rate limit of a key without one of its own, over all gateways: 100/s,"
        " 6000/min, or none",
    )
    gateway_failed_logins_per_minute: int = Field(
        60,
        ge=0,
        le=100_000,
        description="wrong credentials that one address may send to a gateway in a minute before"
        " keys that the gateway does not know get 429; 0: no limit, for a proxy that has its own",
    )
    gateway_jwt_issuer: str = Field(
        "", description="issuer of JWTs that gateways take besides API keys; empty: none"
    )
    gateway_jwt_audience: str = Field("", description="audience that a JWT must name")
    gateway_jwt_jwks: str = Field(
        "", description="the issuer's public keys: an https address of its JWKS, or a file"
    )
    gateway_jwt_algorithms: str = Field(
        "RS256,ES256,EdDSA", description="accepted signatures of JWTs, comma-separated"
    )
    gateway_jwt_scope_claim: str = Field(
        "scope", min_length=1, description="claim with the scopes: words in a text, or a list"
    )
    gateway_jwt_tenant_claim: str = Field(
        "",
        description="claim with the tenant's prefix, which each JWT must then have; empty: JWTs"
        " see all accounts",
    )

    # Webhooks
    webhooks_file: Path | None = Field(
        None, description="TOML file of the endpoints of `recur webhooks`; read again if it changes"
    )
    webhooks_concurrency: int = Field(
        8, ge=1, le=64, description="most deliveries under way for an endpoint in a process"
    )
    webhooks_timeout_seconds: float = Field(
        15.0,
        gt=0,
        le=30,
        description="limit of an attempt to deliver a webhook as a whole, seconds",
    )

    # Operations
    http_host: str = Field("127.0.0.1", description="address of /metrics, /live and /ready")
    http_port: int = Field(9100, ge=0, le=65_535, description="their port; 0 takes a free one")
    watchdog_seconds: float = Field(
        60.0, gt=0, description="a worker exits if records wait this long without progress, seconds"
    )
    startup_timeout_seconds: float = Field(
        10.0, gt=0, le=600, description="longest wait for broker and Redis at start, seconds"
    )
    shutdown_seconds: float = Field(
        15.0,
        ge=1,
        le=600,
        description="a worker ends within this once asked to stop, even if services are away,"
        " seconds; set it below the grace period of the supervisor (Kubernetes: 30)",
    )
    tracing: bool = Field(
        False,
        description="whether workers, gateways and webhooks send OpenTelemetry spans; needs the"
        " extra `tracing`. OTEL_EXPORTER_OTLP_ENDPOINT names the collector",
    )
    trace_sample_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of polls, score requests and deliveries that are traced; those of a"
        " sampled trace always are",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level of written log lines"
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
        self._check_oauth()
        if "@" in self.kafka_bootstrap_servers:
            raise ValueError(
                "kafka_bootstrap_servers takes host:port alone; the user is kafka_sasl_username"
            )
        _check_bootstrap(self.kafka_bootstrap_servers)
        self._check_redis_url()
        self._check_tls()
        self._check_jwt()
        self._check_gateway_tls()
        if (
            self.review_threshold is not None
            and self.decline_threshold is not None
            and self.decline_threshold < self.review_threshold
        ):
            raise ValueError("decline_threshold must not be under review_threshold")
        return self

    def _check_oauth(self) -> None:
        uses_oauth = (
            self.kafka_security_protocol.startswith("SASL")
            and self.kafka_sasl_mechanism == "OAUTHBEARER"
        )
        if uses_oauth and not self.kafka_oauth_token_url:
            raise ValueError("kafka_sasl_mechanism OAUTHBEARER needs kafka_oauth_token_url")
        if not uses_oauth:
            for name in ("token_url", "scope", "cafile"):
                if getattr(self, f"kafka_oauth_{name}"):
                    raise ValueError(
                        f"kafka_oauth_{name} has no effect without a SASL_ protocol and"
                        " kafka_sasl_mechanism OAUTHBEARER"
                    )

    def _check_redis_url(self) -> None:
        """Reject an address that a client would reject or misread.

        Raises:
            ValueError: the address is wrong. The message names the setting, not the address.
        """
        name = _full_name("redis_url")
        scheme, separator, _ = self.redis_url.partition("://")
        if not separator or scheme not in REDIS_SCHEMES:
            raise ValueError(
                f"{name} must begin with redis://, rediss:// (TLS), redis+sentinel://,"
                " rediss+sentinel:// or unix://, such as redis://host:6379/0"
            )
        if scheme.endswith("+sentinel"):
            address = sentinel_address(self.redis_url)
            database: int | None = address.database if address else None
            if address is None:
                raise ValueError(
                    f"{name} must be redis+sentinel://host:26379,host:26379/master-name, with an"
                    " optional /0 for a database; a password with one of the characters / ? # @ ,"
                    " goes into redis_password"
                )
        elif not _is_address(self.redis_url):
            raise ValueError(
                f"{name} has no host, or a port that is no number; a password with one of the"
                " characters / ? # @ goes into redis_password"
            )
        else:
            database = 0 if scheme == "unix" else _database(self.redis_url)
            if database is None:
                raise ValueError(f"{name}: only the number of a database may follow the host")
        if self.redis_cluster and (database or scheme not in ("redis", "rediss")):
            raise ValueError(
                f"{name}: a Redis Cluster has only database 0, and neither Sentinel nor socket:"
                " set it to redis://host:6379/0 of any node, or set redis_cluster"
                " (RECUR_REDIS_CLUSTER) to false"
            )

    def _check_jwt(self) -> None:
        """Reject settings of JWTs that are incomplete or would accept forged ones.

        Raises:
            ValueError: they are wrong. The message names the setting.
        """
        names = [f"gateway_jwt_{name}" for name in ("issuer", "audience", "jwks")]
        given = [name for name in names if getattr(self, name)]
        if given and given != names:
            missing = ", ".join(_full_name(name) for name in names if name not in given)
            raise ValueError(f"JWTs need an issuer, an audience and its keys: set {missing}")
        algorithms = self.jwt_algorithms()
        wrong = [name for name in algorithms if name not in JWT_ALGORITHMS]
        if wrong or not algorithms:
            raise ValueError(
                f"{_full_name('gateway_jwt_algorithms')} takes {', '.join(JWT_ALGORITHMS)} only:"
                " with another one, who can verify a JWT could also make one"
            )
        source = self.gateway_jwt_jwks
        if "://" in source and not source.startswith("https://"):
            raise ValueError(f"{_full_name('gateway_jwt_jwks')} must be https:// or a file")

    def _check_gateway_tls(self) -> None:
        """Reject a private key without a certificate.

        Raises:
            ValueError: the message names the setting.
        """
        if self.gateway_ssl_keyfile is not None and self.gateway_ssl_certfile is None:
            key, certificate = map(_full_name, ("gateway_ssl_keyfile", "gateway_ssl_certfile"))
            raise ValueError(f"{key} needs a certificate: set {certificate}")

    def jwt_algorithms(self) -> list[str]:
        """Return the names of accepted signatures of JWTs."""
        return [name.strip() for name in self.gateway_jwt_algorithms.split(",") if name.strip()]

    @property
    def exactly_once(self) -> bool:
        """Whether scores, alerts and offsets are committed together."""
        return self.processing_guarantee == "exactly_once"

    @property
    def redis_is_tls(self) -> bool:
        """Whether connections to Redis use TLS."""
        return self.redis_url.startswith(("rediss://", "rediss+sentinel://"))

    def _check_tls(self) -> None:
        """Reject TLS options that have no effect: the user would believe the connection encrypted.

        Raises:
            ValueError: there are TLS settings, and TLS is off.
        """
        for service, is_on, how in (
            ("kafka", self.kafka_security_protocol.endswith("SSL"), "kafka_security_protocol"),
            ("redis", self.redis_is_tls, "a redis_url of rediss://"),
        ):
            names = [f"{service}_ssl_{name}" for name in ("cafile", "certfile", "keyfile")]
            given = [name for name in names if getattr(self, name)]
            if given and not is_on:
                raise ValueError(f"{', '.join(given)} is set, but TLS is not on: set {how}")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments, environment, file, defaults."""
        file = os.environ.get(CONFIG_VARIABLE)
        environment = _WithoutKubernetes(settings_cls, env_settings)
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, environment)
        if file:
            sources += (TomlConfigSettingsSource(settings_cls, toml_file=Path(file)),)
        return sources

    def topic(
        self, name: Literal["transactions", "scores", "alerts", "labels", "dead_letter", "audit"]
    ) -> str:
        """Return the full name of a topic, with its prefix."""
        return self.topic_prefix + str(getattr(self, f"{name}_topic"))

    def kafka_client_options(self) -> dict[str, Any]:
        """Return connection arguments for aiokafka's consumer, producer and admin client.

        Raises:
            SettingsError: see :meth:`kafka_ssl_context`.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": self.kafka_bootstrap_servers,
            "security_protocol": self.kafka_security_protocol,
        }
        if self.kafka_security_protocol.startswith("SASL"):
            assert self.kafka_sasl_password is not None
            options["sasl_mechanism"] = self.kafka_sasl_mechanism
            if self.kafka_sasl_mechanism == "OAUTHBEARER":
                options["sasl_oauth_token_provider"] = self.kafka_oauth_tokens()
            else:
                options |= {
                    "sasl_plain_username": self.kafka_sasl_username,
                    "sasl_plain_password": self.kafka_sasl_password.get_secret_value(),
                }
        if self.kafka_security_protocol.endswith("SSL"):
            options["ssl_context"] = self.kafka_ssl_context()
        return options

    def kafka_oauth_tokens(self) -> OAuthTokens:
        """Return the tokens of this client; all connections of equal settings share them.

        Raises:
            SettingsError: the file of authorities is missing or wrong.
        """
        assert self.kafka_oauth_token_url is not None
        assert self.kafka_sasl_username is not None
        assert self.kafka_sasl_password is not None
        return _oauth_tokens(
            self.kafka_oauth_token_url,
            self.kafka_sasl_username,
            self.kafka_sasl_password.get_secret_value(),
            self.kafka_oauth_scope,
            self.kafka_oauth_cafile,
        )

    def kafka_ssl_context(self) -> ssl.SSLContext:
        """Make a TLS context for the brokers, with the client's certificate if one is set.

        Raises:
            SettingsError: a file is missing or wrong. The message names the setting.
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
        except OSError as error:  # base class of ssl's errors
            name = f"{service}_ssl_cafile"
            raise SettingsError(
                f"{_full_name(name)}: no certificates in {cafile} ({error})"
            ) from error
        if certfile:
            try:
                # Without a password OpenSSL would ask the terminal for one.
                password = key_password.get_secret_value() if key_password else ""
                context.load_cert_chain(certfile, keyfile, password)
            except OSError as error:
                names = [f"{service}_ssl_{name}" for name in ("certfile", "keyfile")]
                names += [f"{service}_ssl_key_password"] * (service == "kafka")
                raise SettingsError(
                    f"{', '.join(map(_full_name, names))}: no certificate with its key in"
                    f" {certfile}{f' and {keyfile}' if keyfile else ''} ({error})"
                ) from error
        return context

    def redis_client_options(self) -> dict[str, Any]:
        """Return keyword arguments for ``from_url`` of ``redis.asyncio`` besides the address.

        Raises:
            SettingsError: a file is missing or wrong. The message names the setting.
        """
        options: dict[str, Any] = {
            "socket_timeout": self.redis_timeout_seconds,
            "socket_connect_timeout": self.redis_timeout_seconds,
        }
        if self.redis_username:
            options["username"] = self.redis_username
        if self.redis_password:
            options["password"] = self.redis_password.get_secret_value()
        if self.redis_is_tls:
            self._ssl_context("redis")  # reports a wrong file at once, with its setting
            for name in ("cafile", "certfile", "keyfile"):
                path = getattr(self, f"redis_ssl_{name}")
                if path:
                    options["ssl_ca_certs" if name == "cafile" else f"ssl_{name}"] = str(path)
        return options


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; ``overrides`` win over environment and file.

    Raises:
        SettingsError: a setting is wrong. Each line names one and what it must be.
    """
    file = os.environ.get(CONFIG_VARIABLE)
    if file and not Path(file).is_file():
        raise SettingsError(f"{CONFIG_VARIABLE}: there is no file {file}")
    known = {f"RECUR_{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    unknown = sorted(name for name in os.environ if name.startswith("RECUR_") and name not in known)
    ours = [name for name in unknown if not _is_of_kubernetes(name, os.environ[name])]
    if len(ours) < len(unknown):
        log.debug("variables that Kubernetes sets for services are ignored")
    if ours:
        raise SettingsError("\n".join(f"{name}: {_no_such_setting(name)}" for name in ours))
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_complaints(error))) from None
    except ValueError as error:  # the TOML file is not TOML
        raise SettingsError(f"{file}: {error}") from None


def _is_of_kubernetes(name: str, value: str) -> bool:
    """Tell whether a variable that is no setting comes from Kubernetes, for a service."""
    return bool(_KUBERNETES_NAME.search(name)) or _is_kubernetes_port(name, value)


def _is_kubernetes_port(name: str, value: str) -> bool:
    """Tell whether a variable with a setting's name comes from Kubernetes, such as http_port."""
    return name.endswith("_PORT") and bool(_KUBERNETES_PORT.match(value))


def _no_such_setting(name: str) -> str:
    """Describe an unknown setting; name the new one if it was renamed."""
    old = name.removeprefix("RECUR_").lower()
    new = RENAMED.get(old)
    if new is None:
        return "no such setting; `recur settings` lists them all"
    shown = f"RECUR_{new.upper()}" if name.startswith("RECUR_") else new
    if old == "transactional":
        return f"renamed; set {shown} to exactly_once (true) or at_least_once (false)"
    return f"renamed; set {shown}"


def _full_name(name: str) -> str:
    return f"{name} (RECUR_{name.upper()})"


def _is_address(url: str) -> bool:
    """Tell whether a Redis address has a host, and a number as port if it has a port."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return True
        rest = parts.path + parts.query + parts.fragment
        return bool(parts.hostname) and parts.port != 0 and "@" not in rest
    except ValueError:
        return False


def _check_bootstrap(bootstrap: str) -> None:
    """Reject anything but a list of host:port.

    Raises:
        ValueError: the list is wrong. The message names the setting.
    """
    name = _full_name("kafka_bootstrap_servers")
    for address in bootstrap.split(","):
        scheme, separator, _ = address.strip().partition("://")
        if separator:
            raise ValueError(
                f"{name} has {scheme[:20]}:// before an address: write host:port alone, such as"
                " broker-1:9092,broker-2:9092; the protocol is set by"
                f" {_full_name('kafka_security_protocol')}"
            )
        host, separator, port = address.strip().rpartition(":")
        if not (host or port) or (separator and not (host and port.isdecimal())):
            raise ValueError(
                f"{name} has an address that is not host:port: write broker-1:9092,broker-2:9092"
            )


def sentinel_address(url: str) -> SentinelAddress | None:
    """Parse a ``redis+sentinel://`` address; return None if it is malformed.

    >>> address = sentinel_address("redis+sentinel://a:26380,b/mymaster/2")
    >>> address.hosts, address.master, address.database
    ((('a', 26380), ('b', 26379)), 'mymaster', 2)
    """
    rest = url.partition("://")[2]
    login, _, rest = rest.rpartition("@")
    places, _, path = rest.partition("/")
    master, _, database = path.partition("/")
    username, _, password = login.partition(":")
    hosts = []
    for place in places.split(","):
        host, separator, port = place.strip().rpartition(":")
        if not separator:
            host, port = place.strip(), str(SENTINEL_PORT)
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            return None
        hosts.append((host.strip("[]"), int(port)))
    if not re.fullmatch(r"[A-Za-z0-9._-]+", master) or not re.fullmatch(r"\d{0,4}", database):
        return None
    if "/" in login or "?" in login or "#" in login:
        return None
    return SentinelAddress(
        tuple(hosts), master, int(database or 0), unquote(username) or None,
        unquote(password) or None,
    )  # fmt: skip


def _database(url: str) -> int | None:
    """Read the number of the database in a Redis address; None if it is no number."""
    parts = urlsplit(url)
    named = re.findall(r"(?:^|&)db=([^&]*)", parts.query)
    number = (named or [parts.path.strip("/")])[-1] or "0"
    return int(number) if number.isdecimal() else None


@lru_cache(maxsize=16)
def _oauth_tokens(
    url: str, client_id: str, secret: str, scope: str | None, cafile: Path | None
) -> OAuthTokens:
    from pipeline.oauth_tokens import OAuthTokens

    context = None
    if cafile is not None:
        try:
            context = ssl.create_default_context(cafile=cafile)
        except OSError as error:  # base class of ssl's errors
            raise SettingsError(
                f"{_full_name('kafka_oauth_cafile')}: no certificates in {cafile} ({error})"
            ) from error
    return OAuthTokens(url, client_id, secret, scope, context)


def redis_address(url: str) -> str:
    """Mask user, password and options of a Redis address, so that it may be shown.

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
            message = _no_such_setting(name)
        yield f"{_full_name(name)}: {message}" if name else message


def describe(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows of (name, value, default, description) for ``recur settings``; mask secrets."""
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        yield name, _format(name, value), _format(name, field.default), field.description or ""


def _format(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "redis_url":  # the address may hold a password
        return redis_address(value)
    if name == "checkpoint" and value == SHIPPED_CHECKPOINT:
        return "(the shipped one)"
    return str(value)
