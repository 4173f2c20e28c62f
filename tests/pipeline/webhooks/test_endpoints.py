"""The file of endpoints: what is wrong is named, and no secret is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SettingsError
from pipeline.settings import load_settings
from pipeline.webhooks import endpoints as module
from pipeline.webhooks.endpoints import configured_endpoints, load_endpoints, named_endpoint
from pipeline.webhooks.signing import new_key_pair, new_secret
from tests.pipeline.webhooks.receiver import SECRET, endpoint_table

HTTPS = "https://cases.example/hooks/token-7f3a"


def written(folder: Path, *tables: str) -> Path:
    path = folder / "webhooks.toml"
    path.write_text("\n".join(tables))
    return path


def test_the_documented_file_is_valid(tmp_path: Path) -> None:
    example = "\n".join(
        line[4:] for line in (module.__doc__ or "").splitlines() if line.startswith("    ")
    )
    secret_file = tmp_path / "cases-old"
    secret_file.write_text(f"{new_secret()}\n")
    example = example.replace("/run/secrets/cases-old", str(secret_file))

    found = load_endpoints(written(tmp_path, example), {"CASES_SECRET": new_key_pair()[0]})

    endpoint = found["cases"]
    assert len(endpoint.signers) == 2
    assert endpoint.filter.permits("decline", 0.9)
    assert not endpoint.filter.permits("decline", 0.89)
    assert not endpoint.filter.permits("review", 0.95)
    assert endpoint.policy.permits("10.1.0.1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "http://cases.example/", "allow_networks": []}, "must be https"),
        ({"url": "ftp://cases.example/"}, "must be https"),
        ({"url": "https://user:hunter2@cases.example/"}, "must not hold a user"),
        ({"url": "https://cases.example/#part"}, "fragment"),
        ({"url": "https://cases.example/a b"}, "space"),
        ({"url": "https://[::1/"}, "no URL"),
        ({"name": "Cases!"}, "endpoint 1.name"),
        ({"secrets": []}, "endpoint 1.secrets"),
        ({"secrets": [SECRET] * 6}, "endpoint 1.secrets"),
        ({"secrets": ["hunter2"]}, "secret 1 must begin with whsec_"),
        ({"decisions": ["approve"]}, "endpoint 1.decisions"),
        ({"min_score": 2}, "endpoint 1.min_score"),
        ({"allow_networks": ["10.0.0.1/8"]}, "allow_networks"),
        ({"ca_file": "none.pem"}, "ca_file"),
        ({"colour": "red"}, "endpoint 1.colour"),
    ],
)
def test_what_is_wrong_is_named_with_its_endpoint(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    table = endpoint_table(**({"name": "cases", "url": HTTPS} | fields))

    with pytest.raises(SettingsError) as error:
        load_endpoints(written(tmp_path, table))

    text = str(error.value)
    assert message in text
    assert "hunter2" not in text
    assert SECRET not in text
    assert "token-7f3a" not in text


def test_a_secret_that_is_not_there_is_named(tmp_path: Path) -> None:
    table = endpoint_table("cases", HTTPS).replace(f'"{SECRET}"', '{ env = "NOT_THERE" }')

    with pytest.raises(SettingsError, match="no variable NOT_THERE"):
        load_endpoints(written(tmp_path, table), {})


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'cases' is there twice"):
        load_endpoints(written(tmp_path, *[endpoint_table("cases", HTTPS)] * 2))


@pytest.mark.parametrize("content", [b"[[endpoints", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "webhooks.toml"
    path.write_bytes(content)

    with pytest.raises(SettingsError, match=r"webhooks\.toml"):
        load_endpoints(path)


def test_a_description_of_an_endpoint_shows_no_secret_and_no_url(tmp_path: Path) -> None:
    (endpoint,) = load_endpoints(written(tmp_path, endpoint_table("cases", HTTPS))).values()

    assert SECRET not in repr(endpoint)
    assert "token-7f3a" not in repr(endpoint)


def test_a_changed_secret_makes_another_endpoint(tmp_path: Path) -> None:
    one = load_endpoints(written(tmp_path, endpoint_table("cases", HTTPS)))
    same = load_endpoints(written(tmp_path, endpoint_table("cases", HTTPS)))
    table = endpoint_table("cases", HTTPS, secrets=[new_secret()])
    other = load_endpoints(written(tmp_path, table))

    assert one == same
    assert one != other


def test_an_unknown_endpoint_and_a_missing_file_say_what_to_do(tmp_path: Path) -> None:
    found = load_endpoints(written(tmp_path, endpoint_table("cases", HTTPS)))
    with pytest.raises(SettingsError, match="cases"):
        named_endpoint(found, "other")
    with pytest.raises(SettingsError, match="RECUR_WEBHOOKS_FILE"):
        configured_endpoints(load_settings())
