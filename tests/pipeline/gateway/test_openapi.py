"""The OpenAPI document: its examples match its schemas. A live test sends them to a gateway."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.checkpoint import load_checkpoint
from pipeline.gateway.docs_page import render_page
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


class _Page(HTMLParser):
    """The tags of a page, its anchors and the addresses that it names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.anchors: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value or "")
            elif name in ("href", "src", "srcset", "action", "data"):
                self.addresses.append(value or "")


def test_the_docs_page_shows_each_operation_and_loads_nothing() -> None:
    text = render_page(DOCUMENT)
    page = _Page(text)
    operations = {o["operationId"] for path in DOCUMENT["paths"].values() for o in path.values()}

    assert operations <= page.anchors
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert "url(" not in text
    assert "@import" not in text
    local = [one for one in page.addresses if not one.startswith("#")]
    assert set(local) == {"/openapi.json"}
    assert {one[1:] for one in page.addresses if one.startswith("#")} <= page.anchors
