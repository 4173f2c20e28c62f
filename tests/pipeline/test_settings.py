"""Settings: sources, errors that name the wrong setting, and masked secrets."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SettingsError
from pipeline.settings import (
    CONFIG_VARIABLE,
    RENAMED,
    Settings,
    describe,
    load_settings,
    redis_address,
    sentinel_address,
)
from tests.fakes.secure_services import Authority

PASSWORD = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("RECUR_"):
            monkeypatch.delenv(name)


def complaint(**overrides: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(**overrides)
    return str(caught.value)


def use_file(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    path.write_text(text)
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kafka_security_protocol", "TLS"),
        ("kafka_sasl_mechanism", "KERBEROS"),
        ("kafka_group_id", ""),
        ("kafka_session_timeout_seconds", "0"),
        ("kafka_session_timeout_seconds", "ten"),
        ("kafka_commit_interval_seconds", "0"),
        ("kafka_auto_offset_reset", "middle"),
        ("kafka_replication_factor", "0"),
        ("kafka_replication_factor", "1.5"),
        ("kafka_compression", "rar"),
        ("kafka_linger_ms", "-1"),
        ("kafka_linger_ms", "1001"),
        ("kafka_group_instance_id", "a/b"),
        ("kafka_group_instance_id", "x" * 250),
        ("topic_prefix", "a/b"),
        ("topic_prefix", "{a}"),
        ("topic_prefix", "x" * 50),
        ("transactions_topic", ""),
        ("transactions_topic", "x" * 201),
        ("scores_topic", "sc ores"),
        ("alerts_topic", "{alerts}"),
        ("labels_topic", "lábels"),
        ("dead_letter_topic", "dead:letter"),
        ("topic_partitions", "0"),
        ("topic_partitions", "many"),
        ("log_retention_days", "0"),
        ("log_retention_days", "-1"),
        ("log_retention_days", "inf"),
        ("redis_cluster", "perhaps"),
        ("redis_timeout_seconds", "0"),
        ("redis_timeout_seconds", "nan"),
        ("redis_key_prefix", ""),
        ("redis_key_prefix", "a:{b}"),
        ("state_ttl_days", "0"),
        ("state_ttl_days", "1e9"),
        ("max_timestamp_ahead_seconds", "-1"),
        ("review_threshold", "1.01"),
        ("decline_threshold", "-0.01"),
        ("micro_batch_max", "0"),
        ("micro_batch_max", "65537"),
        ("dead_letter_value_max_bytes", "-1"),
        ("dead_letter_value_max_bytes", "1000000"),
        ("http_port", "65536"),
        ("http_port", "http"),
        ("watchdog_seconds", "0"),
        ("watchdog_seconds", "inf"),
        ("startup_timeout_seconds", "0"),
        ("log_level", "loud"),
        ("log_format", "xml"),
    ],
)
def test_a_wrong_value_stops_the_start_with_a_line_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"RECUR_{name.upper()}", value)

    message = complaint()

    assert message.startswith(f"{name} (RECUR_{name.upper()}): ")
    assert "\n" not in message


def test_several_wrong_values_are_named_in_a_line_each() -> None:
    message = complaint(topic_partitions=0, http_port=-1)

    assert [line.split()[0] for line in message.splitlines()] == ["topic_partitions", "http_port"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"kafka_security_protocol": "SASL_SSL"}, ["kafka_sasl_username", "kafka_sasl_password"]),
        (
            {
                "kafka_security_protocol": "SASL_SSL",
                "kafka_sasl_username": "recur",
                "kafka_sasl_password": "x",
                "kafka_sasl_mechanism": "OAUTHBEARER",
            },
            ["OAUTHBEARER", "kafka_oauth_token_url"],
        ),
        (
            {"kafka_oauth_token_url": "https://id.example/token"},
            ["kafka_oauth_token_url", "no effect"],
        ),
        ({"kafka_oauth_token_url": "http://id.example/token"}, ["kafka_oauth_token_url"]),
        ({"redis_url": "http://127.0.0.1"}, ["redis_url", "rediss://"]),
        (
            {"review_threshold": 0.9, "decline_threshold": 0.5},
            ["review_threshold", "decline_threshold"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    overrides: dict[str, Any], names: list[str]
) -> None:
    message = complaint(**overrides)

    assert all(name in message for name in names)


def test_an_unknown_variable_is_named_since_it_may_be_misspelt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECUR_PARTITION", "4")

    assert complaint() == "RECUR_PARTITION: no such setting; `recur settings` lists them all"


def test_an_unknown_key_in_the_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_file(monkeypatch, tmp_path / "recur.toml", "partition = 4\n")

    assert "partition" in complaint()
    assert "no such setting" in complaint()


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_file(
        monkeypatch,
        tmp_path / "recur.toml",
        'kafka_group_id = "of-file"\ntopic_partitions = 4\nredis_cluster = true\n',
    )
    monkeypatch.setenv("RECUR_TOPIC_PARTITIONS", "5")

    settings = load_settings()

    assert settings.kafka_group_id == "of-file"
    assert settings.redis_cluster is True
    assert settings.topic_partitions == 5
    assert settings.http_port == Settings.model_fields["http_port"].default
    assert load_settings(topic_partitions=6).topic_partitions == 6


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "missing.toml"))

    assert complaint() == f"{CONFIG_VARIABLE}: there is no file {tmp_path / 'missing.toml'}"


def test_a_file_that_is_not_toml_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_file(monkeypatch, tmp_path / "recur.toml", "topic_partitions: 4")

    assert str(tmp_path / "recur.toml") in complaint()


@pytest.fixture
def secretive() -> Settings:
    return load_settings(
        kafka_security_protocol="SASL_PLAINTEXT",
        kafka_sasl_username="recur",
        kafka_sasl_password=PASSWORD,
        kafka_ssl_key_password=PASSWORD,
        redis_password=PASSWORD,
        redis_url=f"redis://recur:{PASSWORD}@redis.example:6379/0",
    )


def test_no_secret_is_in_what_recur_settings_prints(secretive: Settings) -> None:
    rows = list(describe(secretive))

    assert PASSWORD not in str(rows)
    shown = {name: value for name, value, _, _ in rows}
    assert shown["redis_url"] == "redis://**********@redis.example:6379/0"
    assert shown["redis_password"] == "**********"


def test_no_secret_is_in_a_settings_representation(secretive: Settings) -> None:
    assert PASSWORD not in repr(secretive)
    assert PASSWORD not in str(secretive)


def test_no_secret_is_in_a_complaint() -> None:
    assert PASSWORD not in complaint(redis_url=f"http://recur:{PASSWORD}@redis.example")
    assert PASSWORD not in complaint(redis_password=[PASSWORD])


@pytest.mark.parametrize(
    "url",
    [
        f"redis://recur:{PASSWORD}/x@redis.example/0",
        f"redis://recur:{PASSWORD}#x@redis.example/0",
        f"redis://recur:{PASSWORD}?x@redis.example/0",
        f"redis://recur:123?{PASSWORD}@redis.example/0",
        f"redis://:{PASSWORD}",
        f"redis://@/{PASSWORD}",
        f"redis://redis.example:{PASSWORD}/0",
    ],
)
def test_an_address_whose_password_clients_would_quote_is_refused(url: str) -> None:
    """Most passwords here have a character that ends a host's name."""
    message = complaint(redis_url=url)

    assert "redis_password" in message
    assert PASSWORD not in message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"rediss://u:{PASSWORD}@h:1/0", "rediss://**********@h:1/0"),
        (f"redis://u:{PASSWORD}@x@h:1/0", "redis://**********@h:1/0"),
        (f"redis://h:1/0?password={PASSWORD}", "redis://h:1/0?**********"),
        (f"unix://u:{PASSWORD}@/run/redis.sock", "unix://**********@/run/redis.sock"),
        ("redis://h", "redis://h"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redis_address(url) == shown
    assert (
        dict((name, value) for name, value, *_ in describe(load_settings(redis_url=url)))[
            "redis_url"
        ]
        == shown
    )


def test_a_password_in_the_brokers_address_is_refused() -> None:
    assert PASSWORD not in complaint(kafka_bootstrap_servers=f"recur:{PASSWORD}@broker:9092")


def test_secrets_reach_the_clients(secretive: Settings) -> None:
    assert secretive.kafka_client_options()["sasl_plain_password"] == PASSWORD
    assert secretive.redis_client_options()["password"] == PASSWORD


def test_every_setting_is_described_and_those_with_a_unit_name_it() -> None:
    for name, _, _, description in describe(load_settings()):
        assert description, name
        for unit in ("seconds", "days", "bytes"):
            if name.endswith(f"_{unit}"):
                assert unit in description, name


def test_tls_settings_reach_both_clients(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    settings = load_settings(
        redis_url="rediss://redis.example:6380/0", redis_ssl_cafile=authority.cafile
    )

    assert settings.redis_client_options()["ssl_ca_certs"] == str(authority.cafile)
    context = load_settings(kafka_security_protocol="SSL").kafka_client_options()["ssl_context"]
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


def test_a_client_key_is_read_with_its_password_and_without_a_prompt(tmp_path: Path) -> None:
    """Without a password OpenSSL would ask the terminal. A wrong password is not shown."""
    certfile, keyfile = Authority.create(tmp_path).issue(tmp_path, "client", password=PASSWORD)
    options: dict[str, Any] = {
        "kafka_security_protocol": "SSL",
        "kafka_ssl_certfile": certfile,
        "kafka_ssl_keyfile": keyfile,
    }
    load_settings(**options, kafka_ssl_key_password=PASSWORD).kafka_client_options()

    for password in (None, f"not {PASSWORD}"):
        wrong = load_settings(**options, kafka_ssl_key_password=password)
        with pytest.raises(SettingsError, match="RECUR_KAFKA_SSL_KEY_PASSWORD") as caught:
            wrong.kafka_client_options()
        assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("service", ["kafka", "redis"])
def test_a_wrong_tls_file_is_named_with_its_setting(service: str, tmp_path: Path) -> None:
    on = {"kafka": {"kafka_security_protocol": "SSL"}, "redis": {"redis_url": "rediss://redis"}}
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("no certificate")
    for name in ("cafile", "certfile"):
        for path in (tmp_path / "missing.pem", no_pem):
            settings = load_settings(**on[service], **{f"{service}_ssl_{name}": path})
            with pytest.raises(SettingsError) as caught:
                getattr(settings, f"{service}_client_options")()
            assert f"RECUR_{service}_SSL_{name}".upper() in str(caught.value)
            assert str(path) in str(caught.value)


def test_tls_files_without_tls_are_refused() -> None:
    """The user would believe that the connection is encrypted."""
    for name in ("cafile", "certfile", "keyfile"):
        assert "kafka_security_protocol" in complaint(**{f"kafka_ssl_{name}": "a.pem"})
        assert "rediss://" in complaint(**{f"redis_ssl_{name}": "a.pem"})


def test_a_start_with_an_old_name_says_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for old, new in RENAMED.items():
        assert new in Settings.model_fields, new
        assert old not in Settings.model_fields, old
        assert f"renamed; set {new}" in complaint(**{old: "x"})
        with monkeypatch.context() as context:
            context.setenv(f"RECUR_{old.upper()}", "x")
            assert f"RECUR_{old.upper()}: renamed; set RECUR_{new.upper()}" in complaint()


def test_settings_cannot_be_changed_once_loaded() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().topic_partitions = 3


def test_every_topic_takes_the_prefix() -> None:
    settings = load_settings(topic_prefix="eu.", dead_letter_topic="dlq")

    assert settings.topic("transactions") == "eu.transactions"
    assert settings.topic("dead_letter") == "eu.dlq"


KUBERNETES = {  # its variables for services named recur, recur-redis, recur-http, recur-kafka
    "RECUR_SERVICE_HOST": "10.96.0.11",
    "RECUR_SERVICE_PORT": "9100",
    "RECUR_SERVICE_PORT_HTTP_METRICS": "9100",
    "RECUR_PORT": "tcp://10.96.0.11:9100",
    "RECUR_PORT_9100_TCP": "tcp://10.96.0.11:9100",
    "RECUR_PORT_9100_TCP_PROTO": "tcp",
    "RECUR_PORT_9100_TCP_PORT": "9100",
    "RECUR_PORT_9100_TCP_ADDR": "10.96.0.11",
    "RECUR_REDIS_SERVICE_HOST": "10.96.0.12",
    "RECUR_REDIS_SERVICE_PORT": "6379",
    "RECUR_REDIS_PORT": "tcp://10.96.0.12:6379",
    "RECUR_REDIS_PORT_6379_TCP_ADDR": "10.96.0.12",
    "RECUR_HTTP_SERVICE_HOST": "fd00::13",
    "RECUR_HTTP_PORT": "tcp://[fd00::13]:9100",
    "RECUR_HTTP_PORT_9100_TCP": "tcp://[fd00::13]:9100",
    "RECUR_KAFKA_PORT": "udp://10.96.0.14:53",
    "RECUR_KAFKA_PORT_53_UDP_PROTO": "udp",
    "RECUR_WORKER_METRICS_PORT_1_SCTP": "sctp://10.96.0.15:1",
}


def test_variables_that_kubernetes_sets_for_services_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A variable of Kubernetes may have a setting's name; an operator's value still counts."""
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)

    assert load_settings() == load_settings(http_port=9100)

    monkeypatch.setenv("RECUR_HTTP_PORT", "9200")
    assert load_settings().http_port == 9200
    monkeypatch.setenv("RECUR_SERVICE_HOTS", "x")
    monkeypatch.setenv("RECUR_REDIS_PORT", "6379")
    lines = complaint().splitlines()
    assert lines[0].startswith("RECUR_REDIS_PORT: no such setting")
    assert lines[1].startswith("RECUR_SERVICE_HOTS: no such setting")


@pytest.mark.parametrize(
    "bootstrap",
    [
        "PLAINTEXT://broker:9092",
        "kafka://broker:9092",
        "a:9092,SASL_SSL://b:9092",
        "a:9092,",
        "",
        "broker:port",
        ":9092",
        "broker:",
    ],
)
def test_brokers_that_are_not_host_and_port_are_refused(bootstrap: str) -> None:
    message = complaint(kafka_bootstrap_servers=bootstrap)

    assert message.startswith("kafka_bootstrap_servers (RECUR_KAFKA_BOOTSTRAP_SERVERS) has ")
    assert "broker-1:9092" in message
    assert ("RECUR_KAFKA_SECURITY_PROTOCOL" in message) is ("://" in bootstrap)


@pytest.mark.parametrize("bootstrap", ["a", "a:9092", "a:9092, b:9093", "[::1]:9092"])
def test_brokers_that_are_host_and_port_are_accepted(bootstrap: str) -> None:
    assert load_settings(kafka_bootstrap_servers=bootstrap).kafka_bootstrap_servers == bootstrap


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"redis_url": "redis:6379"}, "redis://host:6379/0"),
        ({"redis_url": "redis.example:6379/0"}, "redis://host:6379/0"),
        ({"redis_url": "redis-cluster://h:6379"}, "redis://host:6379/0"),
        ({"redis_url": "redis+sentinel://h:26379"}, "/master-name"),
        ({"redis_url": "redis+sentinel:///mymaster"}, "/master-name"),
        ({"redis_url": "redis+sentinel://h:x/mymaster"}, "/master-name"),
        ({"redis_url": "redis+sentinel://h:26379/mymaster/zero"}, "/master-name"),
        ({"redis_url": f"redis+sentinel://:{PASSWORD}/x@h/mymaster"}, "redis_password"),
        ({"redis_url": "redis://h:6379/mymaster"}, "number of a database"),
        ({"redis_url": "redis://h:6379/0?db=one"}, "number of a database"),
        ({"redis_url": "redis://h:6379/3", "redis_cluster": True}, "database 0"),
        ({"redis_url": "redis://h:6379?db=3", "redis_cluster": True}, "database 0"),
        ({"redis_url": "redis+sentinel://h/mymaster", "redis_cluster": True}, "Sentinel"),
        ({"redis_url": "unix:///run/redis.sock", "redis_cluster": True}, "socket"),
    ],
)
def test_a_redis_address_that_no_client_accepts_is_refused(
    overrides: dict[str, Any], words: str
) -> None:
    message = complaint(**overrides)

    assert "RECUR_REDIS_URL" in message
    assert words in message
    assert PASSWORD not in message


def test_sentinels_are_read_with_their_master_and_both_logins() -> None:
    url = f"rediss+sentinel://recur:{PASSWORD}@s1:26380,s2,[::1]:26379/my-master/2"
    address = sentinel_address(load_settings(redis_url=url).redis_url)

    assert address is not None
    assert address.hosts == (("s1", 26380), ("s2", 26379), ("::1", 26379))
    assert (address.master, address.database) == ("my-master", 2)
    assert (address.username, address.password) == ("recur", PASSWORD)
    assert PASSWORD not in redis_address(url)
    settings = load_settings(redis_url=url, redis_sentinel_password=PASSWORD)
    assert PASSWORD not in str(list(describe(settings)))
    assert settings.redis_is_tls
