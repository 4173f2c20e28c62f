"""View of the demo: a live view in a terminal, plain lines elsewhere, and the summary.

Each colour has one meaning. Green is caught fraud, red is missed fraud or a loss, and yellow is a
false alert. Numbers are bold and their names are dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from model.simulator.world import LEGITIMATE, scenario_name

ALERT_LINES_MAX = 14
PLAIN_LINE_SECONDS = 2.0
WIDTH_MAX = 110
PROGRESS_WIDTH = 28
NARROW = 76
"""Width under which the view omits merchants and second columns."""

ALERT_COLUMNS = ("alerts", "account", "merchant", "amount", "score", "decision", "truth")
ALERT_WIDTHS_MIN = {"alerts": 13, "amount": 9, "decision": 8}
ALERT_NUMBERS = {"alerts", "amount", "score"}
"""Columns on the right edge of their width; the first one holds the simulated time of day."""

_SPARKS = "▁▂▃▄▅▆▇█"
_DASH = "–"


@dataclass(frozen=True, slots=True)
class AlertLine:
    """Line of an alert; ``scenario`` is the truth, 0: legitimate."""

    event_ms: int
    account_id: str
    merchant_id: str
    amount: float
    score: float
    decision: str
    scenario: int


@dataclass(slots=True)
class Scene:
    """Content of the view at one moment."""

    phase: str = ""
    explained: str = ""
    done: float = 0.0
    """Share of the phase that is done, 0 to 1."""
    progress: str = ""
    rate_in: float = 0.0
    rate_out: float = 0.0
    waiting: int = 0
    scored: int = 0
    p50_seconds: float | None = None
    p99_seconds: float | None = None
    event_ms: int | None = None
    caught: int = 0
    missed: int = 0
    alerts: int = 0
    false_alerts: int = 0
    rates_out: Sequence[float] = ()
    """Last rates for the curve, oldest first."""
    shows_alerts: bool = True
    recent: Sequence[AlertLine] = ()
    """Last alerts, newest first."""
    workers: Sequence[str] = ()
    addresses: Sequence[str] = field(default_factory=list)
    http_requests: int = 0
    http_errors: int = 0
    http_p50_seconds: float | None = None
    http_p99_seconds: float | None = None
    """Quantiles of the last seconds' requests to the gateway."""
    hint: str = "Ctrl-C ends the demo"


@dataclass(frozen=True, slots=True)
class DetectionRate:
    """Caught frauds of one kind."""

    name: str
    caught: int
    frauds: int


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """Content of the summary."""

    rows: Sequence[tuple[str, str]]
    """Names and texts, in order."""
    caught: Sequence[DetectionRate]
    workers: Sequence[str]
    faults: Sequence[str]
    """Descriptions of faults; empty after a success."""


class Display(Protocol):
    """Output of the demo."""

    def heading(self, text: str) -> None:
        """Show the first line."""

    def working(self, what: str) -> None:
        """Announce a step that takes some time."""

    def done(self, what: str, detail: str) -> None:
        """Show the result of a step in a line that stays."""

    def note(self, text: str, *, bad: bool = False) -> None:
        """Show an unusual event in a line that stays."""

    def command(self, what: str, line: str) -> None:
        """Show a shell command, whole, so that it can be copied."""

    def show(self, scene: Scene) -> None:
        """Show the present state."""

    def summary(self, summary: DemoSummary) -> None:
        """Show the summary in lines that stay."""

    def close(self) -> None:
        """End the live view."""


class LiveDisplay:
    """Output for a terminal: lines that stay, and a changing view below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._started = False

    def heading(self, text: str) -> None:
        """Print it bold, between empty lines."""
        self._console.print(Text(f"\n  {text}\n", style="bold"))

    def working(self, what: str) -> None:
        """Show a dim line that the next one replaces."""
        self._update(Text(f"  … {what}", style="dim", no_wrap=True, overflow="ellipsis"))

    def done(self, what: str, detail: str) -> None:
        """Print a line with a tick."""
        self._update(Text(""))
        line = Text.assemble(("  ✓ ", "green"), f"{what:<20}", (detail, "dim"))
        self._console.print(line, no_wrap=True, overflow="ellipsis")

    def note(self, text: str, *, bad: bool = False) -> None:
        """Print a marked line."""
        self._console.print(Text(f"  ! {text}", style="red" if bad else "yellow"))

    def command(self, what: str, line: str) -> None:
        """Print it under its heading, in one line however long."""
        self._update(Text(""))
        self._console.print(Text(f"  {what}:", style="dim"))
        self._console.print(Text(line), soft_wrap=True)

    def show(self, scene: Scene) -> None:
        """Redraw the view."""
        self._update(render(scene, self._console.width, self._console.height))

    def summary(self, summary: DemoSummary) -> None:
        """Print the table in place of the view."""
        self.close()
        self._console.print(summary_view(summary))

    def close(self) -> None:
        """Remove the view."""
        if self._started:
            self._live.update(Text(""), refresh=True)
            self._live.stop()
            self._started = False

    def _update(self, renderable: RenderableType) -> None:
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(renderable, refresh=True)


class PlainDisplay:
    """Output for a pipe or a log: some lines, without control characters."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = float("-inf")
        self._phase = ""

    def heading(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def working(self, what: str) -> None:
        """Print a line."""
        self._print(f"... {what}")

    def done(self, what: str, detail: str) -> None:
        """Print a line."""
        self._print(f"ok  {what}: {detail}")

    def note(self, text: str, *, bad: bool = False) -> None:
        """Print a line."""
        self._print(f"!   {text}")

    def command(self, what: str, line: str) -> None:
        """Print two lines."""
        self._print(f"    {what}:")
        self._print(line)

    def show(self, scene: Scene) -> None:
        """Print a line at most every :data:`PLAIN_LINE_SECONDS`, and when a phase begins."""
        now = time.monotonic()
        if scene.phase == self._phase and now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._phase, self._last_line = scene.phase, now
        parts = [
            f"    {scene.phase:<10} {scene.progress:>32}",
            f"in {scene.rate_in:>7,.0f}/s",
            f"out {scene.rate_out:>7,.0f}/s",
            f"waiting {scene.waiting:>7,}",
        ]
        if scene.p50_seconds is not None:
            parts.append(
                f"p50 {milliseconds(scene.p50_seconds)}, p99 {milliseconds(scene.p99_seconds)}"
            )
        if scene.http_requests:
            parts.append(f"HTTP {_http_text(scene)}")
        if scene.alerts:
            parts.append(
                f"fraud caught {scene.caught:,}, missed {scene.missed:,};"
                f" false alerts {scene.false_alerts:,}"
            )
        self._print("  ".join(parts))

    def summary(self, summary: DemoSummary) -> None:
        """Print the table."""
        self._console.print(summary_view(summary))

    def close(self) -> None:
        """Do nothing: no view is open."""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


def display_for(console: Console) -> Display:
    """Choose the live output for a terminal, else the plain one."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(console)


# The view


def render(scene: Scene, width: int, height: int) -> RenderableType:
    """Draw the view within a width and a height; 80 x 24 is enough for all of it."""
    width = min(width, WIDTH_MAX)
    narrow = width < NARROW
    parts: list[RenderableType] = [_header(scene, width), Text(""), _numbers(scene, narrow)]
    if scene.event_ms is not None:
        parts.append(_simulated_time(scene))
    if scene.http_requests:
        parts.append(_http(scene))
    parts += [_curve(scene, width), Text("")]
    footer = _footer(scene, width)
    room = height - 2 - _lines(parts) - _lines(footer)
    if scene.shows_alerts and room >= 3:
        parts += [_alerts(scene, narrow, min(room - 2, ALERT_LINES_MAX)), Text("")]
    return Group(*parts, *footer)


def _header(scene: Scene, width: int) -> RenderableType:
    bar = ProgressBar(
        total=1.0,
        completed=min(1.0, scene.done),
        width=max(10, width - 14 - PROGRESS_WIDTH - 2),
        complete_style="cyan",
        finished_style="cyan",
    )
    row = Table.grid()
    row.add_row(
        Text(f"{scene.phase:>13} ", "bold"), bar, Text(f"{scene.progress:>{PROGRESS_WIDTH}}", "dim")
    )
    return row


def _numbers(scene: Scene, narrow: bool) -> RenderableType:
    left = [
        ("in", f"{scene.rate_in:,.0f}/s", "bold"),
        ("out", f"{scene.rate_out:,.0f}/s", "bold"),
        ("waiting", f"{scene.waiting:,}", "bold"),
    ]
    middle = [
        ("latency p50", milliseconds(scene.p50_seconds), "bold"),
        ("p99", milliseconds(scene.p99_seconds), "bold"),
        ("scored", f"{scene.scored:,}", "bold"),
    ]
    right = [
        ("fraud caught", f"{scene.caught:,}", "bold green"),
        ("missed", f"{scene.missed:,}", "bold red"),
        ("false alerts", f"{scene.false_alerts:,}", "bold yellow"),
    ]
    grid = Table.grid(padding=(0, 1))
    for _ in range(2 if narrow else 3):
        grid.add_column(justify="right", style="dim", min_width=13)
        grid.add_column(justify="right", min_width=10)
    for row in zip(left, middle, right, strict=True):
        cells = [cell for name, value, style in row for cell in (name, Text(value, style))]
        grid.add_row(*(cells[:4] if narrow else cells))
    if narrow:
        for name, value, style in right:
            grid.add_row(name, Text(value, style))
    return grid


def _simulated_time(scene: Scene) -> Text:
    assert scene.event_ms is not None
    when = datetime.fromtimestamp(scene.event_ms / 1000, UTC)
    return Text.assemble(
        (f"{'simulated':>13} ", "dim"),
        (f"{when:%a %d %b %Y %H:%M}", "bold"),
        (f"   {scene.explained}", "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _http(scene: Scene) -> Text:
    return Text.assemble(
        (f"{'HTTP':>13} ", "dim"), _http_text(scene), no_wrap=True, overflow="ellipsis"
    )


def _http_text(scene: Scene) -> str:
    p50, p99 = map(milliseconds, (scene.http_p50_seconds, scene.http_p99_seconds))
    return f"{scene.http_requests:,} requests, p50 {p50}, p99 {p99}, errors {scene.http_errors:,}"


def _curve(scene: Scene, width: int) -> Text:
    rates = list(scene.rates_out)[-max(10, width - 30) :]
    top = max(rates, default=0.0)
    sparks = "".join(
        _SPARKS[min(len(_SPARKS) - 1, int(rate / top * len(_SPARKS)))] if top else _SPARKS[0]
        for rate in rates
    )
    return Text.assemble((f"{'out':>13} ", "dim"), (sparks, "cyan"), no_wrap=True, overflow="crop")


def _alerts(scene: Scene, narrow: bool, lines: int) -> Group:
    """Draw the last alerts; a table of Rich would take ten times as long as these lines."""
    rows = [[Text(name, "dim") for name in ALERT_COLUMNS]]
    for alert in list(scene.recent)[:lines]:
        when = datetime.fromtimestamp(alert.event_ms / 1000, UTC)
        rows.append(
            [
                Text(f"{when:%H:%M:%S}", "dim"),
                Text(alert.account_id),
                Text(alert.merchant_id),
                Text(f"{alert.amount:,.2f}"),
                Text(f"{alert.score:.3f}", "bold"),
                Text(alert.decision),
                truth(alert.scenario),
            ]
        )
    columns = [i for i, name in enumerate(ALERT_COLUMNS) if not (narrow and name == "merchant")]
    widths = [
        max(ALERT_WIDTHS_MIN.get(name, 0), *(row[i].cell_len for row in rows))
        for i, name in enumerate(ALERT_COLUMNS)
    ]
    for row in rows:
        for i in columns[:-1]:
            row[i].align("right" if ALERT_COLUMNS[i] in ALERT_NUMBERS else "left", widths[i])
    drawn = [
        Text("  ", no_wrap=True, overflow="ellipsis").join(row[i] for i in columns) for row in rows
    ]
    return Group(*drawn, *[Text("")] * (lines + 1 - len(drawn)))


def truth(scenario: int) -> Text:
    """Format the true scenario of an alert."""
    return Text(scenario_name(scenario), "yellow" if scenario == LEGITIMATE else "green")


def _footer(scene: Scene, width: int) -> list[RenderableType]:
    lines = [
        Text.assemble((f"{'running':>13} ", "dim"), " · ".join(("Kafka", "Redis", *scene.workers))),
        Text.assemble((f"{'metrics':>13} ", "dim"), "  ".join(scene.addresses)),
        Text(f"{'':>13} {scene.hint}", "dim"),
    ]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return list(lines)


def _lines(parts: Sequence[RenderableType]) -> int:
    """Count the lines of the view's parts; tables here have no border."""
    return sum(part.row_count if isinstance(part, Table) else 1 for part in parts)


# The summary


def summary_view(summary: DemoSummary) -> RenderableType:
    """Draw the summary, for a terminal or a pipe."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right", min_width=13)
    grid.add_column()
    for name, text in summary.rows:
        grid.add_row(name, text)
    for index, kind in enumerate(summary.caught):
        share = f"{kind.caught / kind.frauds:>5.0%}" if kind.frauds else f"{_DASH:>5}"
        grid.add_row(
            "fraud caught" if index == 0 else "",
            f"{share}  {kind.name:<22} {kind.caught:>6,} of {kind.frauds:,}",
        )
    for index, worker in enumerate(summary.workers):
        grid.add_row("workers" if index == 0 else "", worker)
    good = not summary.faults
    result = Text("every transaction was scored exactly once", "green")
    if not good:
        result = Text("; ".join(summary.faults), "bold red")
    grid.add_row("result", result)
    return Group(Rule(Text("Summary", "bold"), style="dim", align="left"), Text(""), grid, Text(""))


def milliseconds(seconds: float | None) -> str:
    """Format a duration, such as 1.8 ms, 250 ms or 12.1 s."""
    if seconds is None:
        return _DASH
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    return f"{seconds * 1000:,.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


def clock(seconds: float) -> str:
    """Format a duration as a clock, such as 0:07 or 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
