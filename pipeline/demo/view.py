"""What the demo shows: a live view in a terminal, plain lines elsewhere, and the summary.

Colour has one meaning everywhere: green is fraud caught, red is fraud missed or something lost,
yellow is a false alert. Numbers are bold, what they are called is dim.
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
"""Under so many columns merchants and second columns are left out."""

_SPARKS = "▁▂▃▄▅▆▇█"
_DASH = "–"


@dataclass(frozen=True, slots=True)
class AlertLine:
    """One alert; ``scenario`` is the truth, 0 legitimate."""

    event_ms: int
    account_id: str
    merchant_id: str
    amount: float
    score: float
    decision: str
    scenario: int


@dataclass(slots=True)
class Scene:
    """Everything the view shows at one moment."""

    phase: str = ""
    explained: str = ""
    done: float = 0.0
    """How much of the phase is over, 0 to 1."""
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
    """The last rates, oldest first, for the little curve."""
    shows_alerts: bool = True
    recent: Sequence[AlertLine] = ()
    """Newest first."""
    workers: Sequence[str] = ()
    addresses: Sequence[str] = field(default_factory=list)
    hint: str = "Ctrl-C ends the demo"


@dataclass(frozen=True, slots=True)
class Caught:
    """Of one kind of fraud."""

    name: str
    caught: int
    frauds: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a person would show to a colleague."""

    rows: Sequence[tuple[str, str]]
    """Name and text, in order."""
    caught: Sequence[Caught]
    workers: Sequence[str]
    faults: Sequence[str]
    """What went wrong; none when all is well."""


class Display(Protocol):
    """Where the demo shows itself."""

    def heading(self, text: str) -> None:
        """The first line."""

    def working(self, what: str) -> None:
        """Something begins that takes a while."""

    def done(self, what: str, detail: str) -> None:
        """A step is over: a line that stays."""

    def note(self, text: str, *, bad: bool = False) -> None:
        """Something out of the ordinary happened: a line that stays."""

    def show(self, scene: Scene) -> None:
        """The present state."""

    def summary(self, summary: Summary) -> None:
        """What it all came to: lines that stay."""

    def close(self) -> None:
        """The live part is over."""


class LiveDisplay:
    """For a terminal: lines that stay above, a view that changes below."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._started = False

    def heading(self, text: str) -> None:
        """Bold, with air around it."""
        self._console.print(Text(f"\n  {text}\n", style="bold"))

    def working(self, what: str) -> None:
        """A dim line that the next one replaces."""
        self._update(Text(f"  … {what}", style="dim", no_wrap=True, overflow="ellipsis"))

    def done(self, what: str, detail: str) -> None:
        """A line with a tick."""
        self._update(Text(""))
        line = Text.assemble(("  ✓ ", "green"), f"{what:<20}", (detail, "dim"))
        self._console.print(line, no_wrap=True, overflow="ellipsis")

    def note(self, text: str, *, bad: bool = False) -> None:
        """A marked line."""
        self._console.print(Text(f"  ! {text}", style="red" if bad else "yellow"))

    def show(self, scene: Scene) -> None:
        """Redraw the view."""
        self._update(render(scene, self._console.width, self._console.height))

    def summary(self, summary: Summary) -> None:
        """The table, in place of the view."""
        self.close()
        self._console.print(summary_view(summary))

    def close(self) -> None:
        """Take the view away."""
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
    """For a pipe or a log: a line now and then, no control characters."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = float("-inf")
        self._phase = ""

    def heading(self, text: str) -> None:
        """One line."""
        self._say(text)

    def working(self, what: str) -> None:
        """One line."""
        self._say(f"... {what}")

    def done(self, what: str, detail: str) -> None:
        """One line."""
        self._say(f"ok  {what}: {detail}")

    def note(self, text: str, *, bad: bool = False) -> None:
        """One line."""
        self._say(f"!   {text}")

    def show(self, scene: Scene) -> None:
        """At most one line in :data:`PLAIN_LINE_SECONDS`, and one when a phase begins."""
        now = time.monotonic()
        if scene.phase == self._phase and now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._phase, self._last_line = scene.phase, now
        parts = [
            f"    {scene.phase:<10} {scene.progress:>15}",
            f"in {scene.rate_in:>7,.0f}/s",
            f"out {scene.rate_out:>7,.0f}/s",
            f"waiting {scene.waiting:>7,}",
        ]
        if scene.p50_seconds is not None:
            parts.append(
                f"p50 {milliseconds(scene.p50_seconds)} p99 {milliseconds(scene.p99_seconds)}"
            )
        if scene.alerts:
            parts.append(f"caught {scene.caught} missed {scene.missed} false {scene.false_alerts}")
        self._say("  ".join(parts))

    def summary(self, summary: Summary) -> None:
        """The same table."""
        self._console.print(summary_view(summary))

    def close(self) -> None:
        """Nothing to take away."""

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


def display_for(console: Console) -> Display:
    """Live in a terminal, else plain."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(console)


# The view


def render(scene: Scene, width: int, height: int) -> RenderableType:
    """The view, no wider and no higher than given (80 x 24 is enough for all of it)."""
    width = min(width, WIDTH_MAX)
    narrow = width < NARROW
    parts: list[RenderableType] = [_header(scene, width), Text(""), _numbers(scene, narrow)]
    if scene.event_ms is not None:
        parts.append(_simulated_time(scene))
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


def _curve(scene: Scene, width: int) -> Text:
    rates = list(scene.rates_out)[-max(10, width - 30) :]
    top = max(rates, default=0.0)
    sparks = "".join(
        _SPARKS[min(len(_SPARKS) - 1, int(rate / top * len(_SPARKS)))] if top else _SPARKS[0]
        for rate in rates
    )
    return Text.assemble((f"{'out':>13} ", "dim"), (sparks, "cyan"), no_wrap=True, overflow="crop")


def _alerts(scene: Scene, narrow: bool, lines: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=13, justify="right")  # simulated time of day
    grid.add_column(no_wrap=True)
    if not narrow:
        grid.add_column(no_wrap=True)
    grid.add_column(justify="right", min_width=9)
    grid.add_column(justify="right")
    grid.add_column(min_width=8)
    grid.add_column(no_wrap=True)
    names = ["alerts", "account", "merchant", "amount", "score", "decision", "truth"]
    if narrow:
        names.remove("merchant")
    grid.add_row(*(Text(name, "dim") for name in names))
    for alert in list(scene.recent)[:lines]:
        when = datetime.fromtimestamp(alert.event_ms / 1000, UTC)
        cells: list[RenderableType] = [
            f"{when:%H:%M:%S}",
            alert.account_id,
            alert.merchant_id,
            f"{alert.amount:,.2f}",
            Text(f"{alert.score:.3f}", "bold"),
            alert.decision,
            truth(alert.scenario),
        ]
        if narrow:
            del cells[2]
        grid.add_row(*cells)
    for _ in range(lines - len(scene.recent)):
        grid.add_row("")
    return grid


def truth(scenario: int) -> Text:
    """What the simulator knows about an alert."""
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
    """Lines that the view's parts take; tables here have no border."""
    return sum(part.row_count if isinstance(part, Table) else 1 for part in parts)


# The summary


def summary_view(summary: Summary) -> RenderableType:
    """The summary, for terminal and pipe alike."""
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
    verdict = Text("every transaction was scored exactly once", "green")
    if not good:
        verdict = Text("; ".join(summary.faults), "bold red")
    grid.add_row("result", verdict)
    return Group(Rule(Text("Summary", "bold"), style="dim", align="left"), Text(""), grid, Text(""))


def milliseconds(seconds: float | None) -> str:
    """For people: 1.8 ms, 250 ms, 12.1 s."""
    if seconds is None:
        return _DASH
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    return f"{seconds * 1000:,.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


def clock(seconds: float) -> str:
    """For people: 0:07, 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
