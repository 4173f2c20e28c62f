"""Write docs/reference/*.md and docs/asyncapi.yaml from the code (`make docs`).

With ``--check`` nothing is written; the exit status is 1 if a page is not current.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml
from prometheus_client import CollectorRegistry, Metric

from pipeline.cli.main import recur
from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.gateway.problems import PROBLEM_TYPES
from pipeline.kafka.asyncapi import asyncapi_document
from pipeline.scoring.metrics import Metrics
from pipeline.settings import RENAMED, Settings, describe
from pipeline.webhooks.metrics import WebhookMetrics
from pipeline.webhooks.schedule import (
    JITTER_SHARE,
    RETRY_AFTER_MAX_SECONDS,
    RETRY_DELAYS_SECONDS,
    SLOW_MAX_SECONDS,
    SLOW_MIN_SECONDS,
)
from pipeline.webhooks.sender import GONE, SLOW_DOWN

FOLDER = Path(__file__).parent
WIDTH = 96
GENERATED = "<!-- Written by `make docs` from the code. Change the code instead. -->\n"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def settings_page() -> str:
    """Every setting with its default, its permitted values and its meaning."""
    rows = {name: row for name, *row in describe(Settings.model_construct())}
    lines = [
        "# Settings",
        "",
        "Set a variable in the environment, or the lower-case name without `RECUR_` in a TOML file",
        "(`recur --config FILE worker`, or `RECUR_CONFIG`). The environment wins over the file.",
        "`recur settings` prints the values in use, with secrets masked.",
    ]
    for title, names in _groups():
        lines += ["", f"## {title}", "", "| variable | default | values | meaning |"]
        lines += ["|---|---|---|---|"]
        for name in names:
            _, default, meaning = rows[name]
            values = _permitted(name)
            cells = (f"`RECUR_{name.upper()}`", _code(default), values, _sentence(meaning))
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += ["", "## Renamed in 0.2.0", "", "A start with an old name fails and says the new one."]
    lines += ["", "| old | new |", "|---|---|"]
    lines += [f"| `RECUR_{old.upper()}` | `RECUR_{new.upper()}` |" for old, new in RENAMED.items()]
    return _page(lines)


def _groups() -> Iterator[tuple[str, list[str]]]:
    """Settings by the headings in their class, in its order."""
    title, names = "", list[str]()
    for line in inspect.getsource(Settings).splitlines():
        if heading := re.fullmatch(r"    # (\w+)", line):
            if names:
                yield title, names
            title, names = heading[1], []
        elif (field := re.match(r"    (\w+): ", line)) and field[1] in Settings.model_fields:
            names.append(field[1])
    yield title, names


def _permitted(name: str) -> str:
    field = Settings.model_fields[name]
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(_code(str(value)) for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    limits = [
        f"{sign} {getattr(bound, key):,}"
        for bound in field.metadata
        for key, sign in BOUNDS.items()
        if getattr(bound, key, None) is not None
    ]
    return ", ".join(limits)


def metrics_page() -> str:
    """Every metric of a worker, of a gateway and of webhooks, as Prometheus stores it."""
    lines = [
        "# Metrics",
        "",
        "A worker serves these at `/metrics`. A histogram has the endings `_bucket`, `_sum` and",
        "`_count`. Times are in seconds. No label holds an account, a merchant or an address.",
        "`deploy/prometheus/alerts.yml` and the dashboard in `deploy/grafana` use them.",
        "",
        *_metrics_table(Metrics(CollectorRegistry())),
        "",
        "## Gateway",
        "",
        "A gateway serves these at its own `/metrics`, to keys with the scope `read`. Refused",
        "requests count, too: those refused before their route is known have the route `(none)`.",
        "",
        *_metrics_table(GatewayMetrics()),
        "",
        "## recur webhooks",
        "",
        *_metrics_table(WebhookMetrics(CollectorRegistry())),
        "",
        "Besides these all serve the `process_*` metrics of prometheus_client.",
    ]
    return _page(lines)


def _metrics_table(metrics: Metrics | GatewayMetrics | WebhookMetrics) -> list[str]:
    """The rows of all metrics of a process."""
    families = [f for f in metrics.registry.collect() if f.name.startswith("recur_")]
    labels = {
        getattr(metric, "_name", ""): list(getattr(metric, "_labelnames", ()))
        for metric in vars(metrics).values()
    }
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in sorted(families, key=lambda f: f.name):
        ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
        shown = "; ".join(_label(family, label) for label in labels.get(family.name, []))
        cells = (f"`{family.name}{ending}`", family.type, shown, _sentence(family.documentation))
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _label(family: Metric, label: str) -> str:
    """A label, with its values where they are known from the start."""
    values = dict.fromkeys(s.labels[label] for s in family.samples if label in s.labels)
    return f"`{label}`" + (f": {', '.join(values)}" if values else "")


def retries_page() -> str:
    """The table of attempts to deliver a webhook, and what each answer does."""
    statuses = ", ".join(map(str, sorted(SLOW_DOWN)))
    lines = [
        "# Retries of webhooks",
        "",
        "A delay counts from the failure before it. A random share of the delay, up to"
        f" {JITTER_SHARE:.0%}, is",
        "added, so that the retries of an outage spread. The last column is without it.",
        "",
        "| attempt | delay | time since the first |",
        "|---:|---:|---:|",
    ]
    total = 0.0
    for number, delay in enumerate(RETRY_DELAYS_SECONDS, 1):
        total += delay
        lines.append(f"| {number} | {_span(delay)} | {_span(total)} |")
    return _page(
        [
            *lines,
            "",
            f"If attempt {len(RETRY_DELAYS_SECONDS)} fails, the alert becomes a dead letter.",
            "",
            "| answer | effect |",
            "|---|---|",
            "| 200 to 299 | delivered |",
            f"| {GONE} | the endpoint is disabled until `recur webhooks resume`; its alerts wait |",
            f"| {statuses} | a failure; the endpoint gets a pause of {_span(SLOW_MIN_SECONDS)} that"
            f" doubles up to {_span(SLOW_MAX_SECONDS)}, or what `Retry-After` asks for, up to"
            f" {_span(RETRY_AFTER_MAX_SECONDS)}; then one delivery at a time until one succeeds |",
            "| any other status, redirects included | a failure |",
            "| none within `RECUR_WEBHOOKS_TIMEOUT_SECONDS`, no connection, a forbidden address |"
            " a failure |",
        ]
    )


def _span(seconds: float) -> str:
    """A time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    parts = ((minutes // 60, "h"), (minutes % 60, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def commands_page() -> str:
    """Every command with its options, as ``--help`` prints it."""
    lines = ["# Commands", "", "What `recur COMMAND --help` prints.", ""]
    commands = list(_commands(recur, None, "recur"))
    lines += [f"- [`{path}`](#{path.replace(' ', '-')})" for path, _ in commands]
    for path, text in commands:
        lines += ["", f"## {path}", "", "```text", *text.splitlines(), "```"]
    return _page(lines)


def _commands(
    command: click.Command, parent: click.Context | None, path: str
) -> Iterator[tuple[str, str]]:
    context = click.Context(
        command, parent=parent, info_name=path.rpartition(" ")[2], max_content_width=WIDTH,
        terminal_width=WIDTH, **command.context_settings,
    )  # fmt: skip
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(child, context, f"{path} {name}")


def gateway_errors_page() -> str:
    """Every type of problem that a gateway answers with."""
    lines = [
        "# Errors of the gateway",
        "",
        "Every error is a problem of RFC 9457: `application/problem+json` with `type`, `title`,",
        "`status`, `request_id`, and where it helps `detail` and `errors`. `type` is a reference",
        "relative to the gateway's address. An entry of `errors` has `detail` and one of `pointer`",
        "(a JSON pointer into the body), `parameter` and `header`. A problem with `Retry-After` is",
        "worth another try after so long; the others come again until the request is changed.",
        "",
        "```json",
        '{"type": "/problems/invalid-fields", "title": "Fields of the body are not valid",',
        ' "status": 422, "request_id": "4bf92f3577b34da6a3ce929d0e0e4736",',
        ' "errors": [{"detail": "Expected `float`, got `str`", "pointer": "/amount"}]}',
        "```",
        "",
        "| type | status | retry | title | meaning |",
        "|---|---:|---|---|---|",
    ]
    for kind in PROBLEM_TYPES.values():
        wait = kind.retry_after_seconds
        retry = "no" if wait is None else f"after {wait} s or more"
        meaning = re.sub(r"(RECUR_[A-Z_]+)", r"`\1`", kind.meaning)
        cells = (f"`{kind.uri}`", str(kind.status), retry, kind.title, meaning)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return _page(lines)


def _code(text: str) -> str:
    """Text as code, in TOML's form; what stands for no value or the shipped file stays text."""
    if not text or text == "-":
        return "none"
    if text in ("True", "False"):
        text = text.lower()
    return text if text.startswith("(") else f"`{text}`"


def _sentence(text: str) -> str:
    """A description that begins with a capital, unless its first word is a name."""
    first = text.partition(" ")[0].rstrip(",:;")
    return text[:1].upper() + text[1:] if first.isalpha() else text


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _page(lines: list[str]) -> str:
    return GENERATED + "\n".join(line.rstrip() for line in lines) + "\n"


class _WithoutAliases(yaml.SafeDumper):
    """Dumper that writes a part that occurs twice out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def asyncapi_file() -> str:
    """The topics and their records, as an AsyncAPI document."""
    document = asyncapi_document(Settings.model_construct())
    text: str = yaml.dump(
        document, Dumper=_WithoutAliases, sort_keys=False, width=WIDTH, allow_unicode=True
    )
    return "# Written by `make docs` from the code. Change the code instead.\n" + text


PAGES = {
    "reference/settings.md": settings_page,
    "reference/metrics.md": metrics_page,
    "reference/commands.md": commands_page,
    "asyncapi.yaml": asyncapi_file,
    "reference/gateway-errors.md": gateway_errors_page,
    "reference/webhook-retries.md": retries_page,
}


def main(check: bool) -> int:
    """Write the pages, or name those that are not current."""
    stale = []
    for name, page in PAGES.items():
        file, text = FOLDER / name, page()
        if file.is_file() and file.read_text() == text:
            continue
        stale.append(f"docs/{name}")
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    if check and stale:
        print(f"{', '.join(stale)}: not current; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
