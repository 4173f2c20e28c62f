"""The documentation page: the OpenAPI document as one HTML page without scripts or downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font:14px/1.45 ui-monospace,monospace}pre{background:#f4f4f4;padding:.8rem;"
    "overflow:auto}h2{border-top:1px solid #ccc;padding-top:1rem}table{border-collapse:collapse}"
    "td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}pre{background:#222}"
    "a{color:#8bf}}"
)


def render_page(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document as HTML."""
    info = document["info"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{_text(info['description'])}</p>"
        '<p>The machine-readable document: <a href="/openapi.json">/openapi.json</a>. Send'
        " <code>Authorization: Bearer TOKEN</code> with each request.</p><ul>"
    ]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for path, method, operation in operations:
        name = escape(operation["operationId"])
        parts.append(
            f'<li><a href="#{name}"><code>{method.upper()} {escape(path)}</code></a>'
            f" {escape(operation['summary'])}</li>"
        )
    parts.append("</ul>")
    for path, method, operation in operations:
        parts += _operation(path, method, operation)
    parts.append("<h2>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        shown = json.dumps(schema, indent=2)
        parts.append(
            f'<details id="schema-{escape(name)}"><summary><code>{escape(name)}</code></summary>'
            f"<pre>{escape(shown)}</pre></details>"
        )
    return "".join([*parts, "</body></html>"])


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f'<h2 id="{escape(operation["operationId"])}"><code>{method.upper()} {escape(path)}</code>'
        f"</h2><p><b>{escape(operation['summary'])}.</b>"
        f" {_text(operation.get('description', ''))}</p>"
    )
    if operation.get("parameters"):
        yield "<table><tr><th>parameter</th><th>in</th><th></th></tr>"
        for parameter in operation["parameters"]:
            yield (
                f"<tr><td><code>{escape(parameter['name'])}</code></td><td>{parameter['in']}</td>"
                f"<td>{_text(parameter.get('description', ''))}</td></tr>"
            )
        yield "</table>"
    body = operation.get("requestBody")
    if body is not None:
        yield "<p>Body:</p>"
        yield from _examples(body["content"])
    yield "<table><tr><th>status</th><th>meaning</th></tr>"
    for status, answer in operation["responses"].items():
        yield f"<tr><td>{status}</td><td>{_text(answer['description'])}</td></tr>"
    yield "</table>"
    for status, answer in operation["responses"].items():
        if status.startswith("2") and answer.get("content"):
            yield f"<p>Answer {status}:</p>"
            yield from _examples(answer["content"])


def _examples(content: Mapping[str, Any]) -> Iterator[str]:
    for kind in content.values():
        ref = kind["schema"].get("$ref")
        if ref is not None:
            name = escape(ref.rpartition("/")[2])
            yield f'<p>Schema <a href="#schema-{name}"><code>{name}</code></a></p>'
        for example in kind.get("examples", {}).values():
            yield f"<pre>{escape(json.dumps(example['value'], indent=2))}</pre>"


def _text(text: str) -> str:
    """Escape a text; what stands between backquotes is code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
