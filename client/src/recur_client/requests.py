"""Requests of the gateway's routes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from recur_client.calls import Send

Fields = Mapping[str, Any]


def _body(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def score(transaction: Fields, wait_seconds: int | None) -> Send:
    """Score a transaction."""
    return Send("POST", "/v1/scores", _body(dict(transaction)), wait_seconds)


def batch(transactions: Sequence[Fields], wait_seconds: int | None) -> Send:
    """Score several transactions."""
    body = _body({"transactions": [dict(one) for one in transactions]})
    return Send("POST", "/v1/scores/batch", body, wait_seconds)


def get_score(transaction_id: str) -> Send:
    """Find a score."""
    return Send("GET", f"/v1/scores/{quote(transaction_id, safe='')}")


def what_if(transaction: Fields, variants: Sequence[Fields] | None) -> Send:
    """Score variants of a transaction."""
    body: dict[str, Any] = {"transaction": dict(transaction)}
    if variants is not None:
        body["variants"] = [dict(one) for one in variants]
    return Send("POST", "/v1/what-if", _body(body))


def label(fields: Fields) -> Send:
    """Report a label."""
    return Send("POST", "/v1/labels", _body(dict(fields)))


def account(account_id: str) -> Send:
    """Show an account."""
    return Send("GET", f"/v1/accounts/{quote(account_id, safe='')}")


def alerts(query: Fields) -> Send:
    """Read a page of alerts; the query's name ``from_`` stands for ``from``."""
    pairs = {name.rstrip("_"): value for name, value in query.items() if value is not None}
    return Send("GET", "/v1/alerts" + (f"?{urlencode(pairs)}" if pairs else ""))
