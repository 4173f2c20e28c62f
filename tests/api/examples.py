"""The examples of an OpenAPI document, as requests and as values with their schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import jsonschema_rs


@dataclass(frozen=True)
class ExampleRequest:
    """A request that an operation's examples make.

    Attributes:
        operation: the operation's id.
        path: with the examples of its path parameters.
        headers: examples of its header parameters.
        body: None for a method without a body.
        answers: its documented statuses, and the schemas of their JSON bodies; None: not JSON.
    """

    operation: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    answers: Mapping[int, Any] = field(repr=False)


def requests_of(document: Mapping[str, Any]) -> Iterator[ExampleRequest]:
    """Make a request of each example, and one of each operation without an example."""
    for template, methods in document["paths"].items():
        for method, operation in methods.items():
            path, headers = template, {}
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    name = f"{{{parameter['name']}}}"
                    path = path.replace(name, quote(parameter["example"], safe=""))
                elif parameter["in"] == "header" and "example" in parameter:
                    headers[parameter["name"]] = parameter["example"]
            content = operation.get("requestBody", {}).get("content", {})
            bodies = content.get("application/json", {}).get("examples", {"": {"value": None}})
            answers = {
                int(status): _schema(answer) for status, answer in operation["responses"].items()
            }
            for example in bodies.values():
                yield ExampleRequest(
                    operation["operationId"], method, path, headers, example["value"], answers
                )


def values_of(document: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield a name, value and schema for each example of a body, of a request or an answer."""
    for methods in document["paths"].values():
        for operation in methods.values():
            parts = {"request": operation.get("requestBody", {}), **operation["responses"]}
            for part, described in parts.items():
                for content in described.get("content", {}).values():
                    for name, example in content.get("examples", {}).items():
                        place = f"{operation['operationId']}-{part}-{name}"
                        yield place, example["value"], content["schema"]


def check(document: Mapping[str, Any], schema: Any, value: Any) -> None:
    """Check a value against a schema of a document.

    Raises:
        jsonschema_rs.ValidationError: it does not match.
    """
    whole = {**schema, "components": document["components"]}
    jsonschema_rs.Draft202012Validator(whole).validate(value)


def _schema(answer: Mapping[str, Any]) -> Any:
    content = answer.get("content", {})
    for kind in ("application/json", "application/problem+json"):
        if kind in content:
            return content[kind]["schema"]
    return None
