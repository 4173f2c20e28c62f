"""Problems name type, fields and request; a tenant cannot tell what it may not see from nothing."""

from __future__ import annotations

import json
import re

import msgspec
import pytest

from model.transaction import Transaction
from pipeline.gateway import problems
from pipeline.gateway.principal import TENANT, Principal
from pipeline.gateway.problems import (
    PROBLEM_TYPES,
    FieldError,
    Problem,
    ProblemType,
    field_error,
    invalid_fields,
)
from pipeline.gateway.tenants import check_seen, not_found, sees


class _Item(msgspec.Struct, forbid_unknown_fields=True):
    amount: int


class _Items(msgspec.Struct):
    items: list[_Item]
    extra: dict[str, list[int]] = {}


def test_the_table_holds_every_type() -> None:
    named = {kind for kind in vars(problems).values() if isinstance(kind, ProblemType)}
    assert named == set(PROBLEM_TYPES.values())
    for kind in named:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.name)
        assert 400 <= kind.status < 600
        waits = kind.status in (429, 503)
        assert (kind.retry_after_seconds is not None) == waits, kind.name


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"amount": "x"}', "/amount"),
        (b'{"amount": 5}', "/transaction_id"),
        (b'{"transaction_id": 5}', "/transaction_id"),
        (b"[]", ""),
        (
            b'{"transaction_id":"t","account_id":"a","merchant_id":"m","amount":-1,'
            b'"currency":"EUR","timestamp":0}',
            "/amount",
        ),
    ],
)
def test_a_wrong_field_is_named_by_its_pointer(body: bytes, pointer: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=Transaction)

    problem = invalid_fields(caught.value)
    assert problem.kind.status == 422
    (error,) = json.loads(problem.body("id"))["errors"]
    assert error["pointer"] == pointer
    assert "`$" not in error["detail"]


def test_pointers_reach_into_lists_and_escape_names() -> None:
    cases = {
        b'{"items": [{"amount": 1}, {"amount": "x"}]}': "/items/1/amount",
        b'{"items": [{}]}': "/items/0/amount",
        b'{"items": [{"amount": 1, "a/b~c": 1}]}': "/items/0/a~1b~0c",
        b'{"items": [], "extra": {"x": [1, "y"]}}': "/extra",
    }
    for body, pointer in cases.items():
        with pytest.raises(msgspec.ValidationError) as caught:
            msgspec.json.decode(body, type=_Items)
        assert field_error(caught.value).pointer == pointer


def test_a_problem_is_what_rfc_9457_says() -> None:
    problem = Problem(
        problems.RATE_LIMITED,
        "at most 5",
        errors=[FieldError("wrong", header="Prefer")],
        retry_after_seconds=1.2,
        headers=((b"x", b"y"),),
        extensions={"reason": "id"},
    )
    assert json.loads(problem.body("r1")) == {
        "type": "/problems/rate-limited",
        "title": problems.RATE_LIMITED.title,
        "status": 429,
        "detail": "at most 5",
        "request_id": "r1",
        "errors": [{"detail": "wrong", "header": "Prefer"}],
        "reason": "id",
    }
    assert dict(problem.headers()) == {
        b"content-type": b"application/problem+json",
        b"cache-control": b"no-store",
        b"retry-after": b"2",
        b"x": b"y",
    }
    assert "at most" not in str(problem)  # what is logged by mistake says nothing


def test_a_tenant_sees_only_its_own_ids() -> None:
    acme = Principal("api_key", "1", "till", frozenset(), tenant="acme-")
    everyone = Principal("api_key", "2", "till", frozenset())
    assert sees(everyone, account_id="x", transaction_id="y")
    assert sees(acme, account_id="acme-1", transaction_id="acme-t")
    assert sees(acme, transaction_id="acme-t")
    for account, transaction in (
        ("acme-1", "t"), ("a", "acme-t"), ("acme", "acme-t"), ("ACME-1", "acme-t"), ("", "acme-"),
    ):  # fmt: skip
        assert not sees(acme, account_id=account, transaction_id=transaction)
        with pytest.raises(Problem) as caught:
            check_seen(acme, account_id=account, transaction_id=transaction)
        assert caught.value.body("r") == not_found().body("r")
        assert caught.value.headers() == not_found().headers()


def test_no_tenant_is_the_beginning_of_another_by_mistake() -> None:
    assert TENANT.fullmatch("acme-")
    assert not TENANT.fullmatch("acme")
    assert not TENANT.fullmatch("")
