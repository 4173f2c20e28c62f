"""How far a long transfer is: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 2.0


class Bar(Protocol):
    """Shows how far something is, and how fast it goes."""

    def __enter__(self) -> Bar: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, what: str, done: int, fraction: float) -> None:
        """So many are done, which is this fraction of all."""


def bar_for(console: Console) -> Bar:
    """A progress bar in a terminal, else a line now and then."""
    if console.is_terminal and not console.is_dumb_terminal:
        return _TerminalBar(console)
    return _PlainBar(console)


class _Speed:
    """Of the last seconds, from a count that grows."""

    def __init__(self) -> None:
        self._what = ""
        self._marks: list[tuple[float, int]] = []

    def per_second(self, what: str, done: int) -> float:
        now = time.monotonic()
        if what != self._what:
            self._what, self._marks = what, []
        self._marks = [*self._marks[-10:], (now, done)]
        then, before = self._marks[0]
        return (done - before) / (now - then) if now > then else 0.0


class _TerminalBar:
    def __init__(self, console: Console) -> None:
        self._speed = _Speed()
        self._progress = Progress(
            TextColumn("{task.description:>18}", style="dim"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[told]}", style="bold"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, told="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, fraction: float) -> None:
        told = f"{done:,}  {self._speed.per_second(what, done):,.0f}/s"
        self._progress.update(self._task, description=what, completed=min(1.0, fraction), told=told)


class _PlainBar:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._speed = _Speed()
        self._last_line = self._started = time.monotonic()
        self._what = ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, what: str, done: int, fraction: float) -> None:
        now = time.monotonic()
        speed = self._speed.per_second(what, done)
        if what != self._what:
            self._what, self._started = what, now
        if now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._last_line = now
        left = f", {(now - self._started) * (1 / fraction - 1):,.0f} s left" if fraction else ""
        self._console.print(f"{what}: {done:,} ({min(1.0, fraction):.0%}), {speed:,.0f}/s{left}")
