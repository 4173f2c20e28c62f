"""The OpenAPI document: its examples match its schemas. A live test sends them to a gateway."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.checkpoint import load_checkpoint
from pipeline.gateway.openapi import make_document
from pipeline.settings import load_settings
from tests.api.examples import check, requests_of, values_of

DOCUMENT = make_document(load_settings(), load_checkpoint(load_settings()))


@pytest.mark.parametrize(
    ("value", "schema"),
    [pytest.param(value, schema, id=name) for name, value, schema in values_of(DOCUMENT)],
)
def test_each_example_matches_its_schema(value: Any, schema: Any) -> None:
    check(DOCUMENT, schema, value)


def test_each_operation_has_a_request_with_every_path_parameter() -> None:
    made = list(requests_of(DOCUMENT))

    assert len({one.operation for one in made}) == sum(map(len, DOCUMENT["paths"].values()))
    assert not [one.path for one in made if "{" in one.path]
    assert all(one.body for one in made if one.method == "post")
