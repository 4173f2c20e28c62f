"""Settings: each wrong one is named, each comes from where it should, and no secret is shown."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SettingsError
from pipeline.settings import CONFIG_VARIABLE, Settings, describe, load_settings, redis_address
from tests.secure_services import Authority

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
        ("kafka_group", ""),
        ("kafka_session_timeout_seconds", "0"),
        ("kafka_session_timeout_seconds", "ten"),
        ("kafka_commit_interval_seconds", "0"),
        ("kafka_offset_reset", "middle"),
        ("kafka_replication_factor", "0"),
        ("kafka_replication_factor", "1.5"),
        ("kafka_compression", "rar"),
        ("topic_prefix", "a/b"),
        ("topic_prefix", "{a}"),
        ("topic_prefix", "x" * 50),
        ("transactions_topic", ""),
        ("transactions_topic", "x" * 201),
        ("scores_topic", "sc ores"),
        ("alerts_topic", "{alerts}"),
        ("labels_topic", "lábels"),
        ("dead_letter_topic", "dead:letter"),
        ("partitions", "0"),
        ("partitions", "many"),
        ("log_retention_days", "0"),
        ("log_retention_days", "-1"),
        ("log_retention_days", "inf"),
        ("redis_cluster", "perhaps"),
        ("redis_timeout_seconds", "0"),
        ("redis_timeout_seconds", "nan"),
        ("key_prefix", ""),
        ("key_prefix", "a:{b}"),
        ("state_ttl_days", "0"),
        ("state_ttl_days", "1e9"),
        ("future_limit_seconds", "-1"),
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
def test_a_wrong_value_ends_the_start_with_a_line_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"RECUR_{name.upper()}", value)

    message = complaint()

    assert message.startswith(f"{name} (RECUR_{name.upper()}): ")
    assert "\n" not in message


def test_several_wrong_values_are_named_together_a_line_for_each() -> None:
    message = complaint(partitions=0, http_port=-1)

    assert [line.split()[0] for line in message.splitlines()] == ["partitions", "http_port"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"kafka_security_protocol": "SASL_SSL"}, ["kafka_sasl_username", "kafka_sasl_password"]),
        ({"redis_url": "http://127.0.0.1"}, ["redis_url", "rediss://"]),
        (
            {"review_threshold": 0.9, "decline_threshold": 0.5},
            ["review_threshold", "decline_threshold"],
        ),
    ],
)
def test_settings_that_do_not_belong_together_are_named(
    overrides: dict[str, Any], names: list[str]
) -> None:
    message = complaint(**overrides)

    assert all(name in message for name in names)


def test_an_unknown_variable_is_named_because_it_may_be_a_misspelt_one(
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


def test_environment_goes_over_file_and_file_over_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_file(
        monkeypatch,
        tmp_path / "recur.toml",
        'kafka_group = "of-file"\npartitions = 4\nredis_cluster = true\n',
    )
    monkeypatch.setenv("RECUR_PARTITIONS", "5")

    settings = load_settings()

    assert settings.kafka_group == "of-file"
    assert settings.redis_cluster is True
    assert settings.partitions == 5
    assert settings.http_port == Settings.model_fields["http_port"].default
    assert load_settings(partitions=6).partitions == 6


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "missing.toml"))

    assert complaint() == f"{CONFIG_VARIABLE}: there is no file {tmp_path / 'missing.toml'}"


def test_a_file_that_is_not_toml_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_file(monkeypatch, tmp_path / "recur.toml", "partitions: 4")

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
def test_an_address_that_clients_would_quote_in_an_error_is_refused_before(url: str) -> None:
    """Most of them are of a password with a character that ends a host's name."""
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
def test_of_an_address_is_shown_what_is_no_secret(url: str, shown: str) -> None:
    assert redis_address(url) == shown
    assert (
        dict((name, value) for name, value, *_ in describe(load_settings(redis_url=url)))[
            "redis_url"
        ]
        == shown
    )


def test_a_password_in_the_brokers_address_is_refused() -> None:
    assert PASSWORD not in complaint(kafka_bootstrap=f"recur:{PASSWORD}@broker:9092")


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


def test_a_client_key_is_read_with_its_password_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    """A missing password would have OpenSSL wait at the terminal; a wrong one is not shown."""
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
def test_a_tls_file_that_is_none_is_told_by_its_setting(service: str, tmp_path: Path) -> None:
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


def test_tls_files_without_tls_are_a_mistake() -> None:
    """Or passwords would go in clear where one thinks that they do not."""
    for name in ("cafile", "certfile", "keyfile"):
        assert "kafka_security_protocol" in complaint(**{f"kafka_ssl_{name}": "a.pem"})
        assert "rediss://" in complaint(**{f"redis_ssl_{name}": "a.pem"})


def test_settings_cannot_be_changed_once_loaded() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().partitions = 3


def test_every_topic_takes_the_prefix() -> None:
    settings = load_settings(topic_prefix="eu.", dead_letter_topic="dlq")

    assert settings.topic("transactions") == "eu.transactions"
    assert settings.topic("dead_letter") == "eu.dlq"
