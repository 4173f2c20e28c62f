"""Progress of a training or a long transfer: a bar in a terminal, else a line at intervals."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from model.training.train import Report

PLAIN_LINE_SECONDS = 2.0


class Bar(Protocol):
    """A display of progress and speed."""

    def __enter__(self) -> Bar: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, what: str, done: int, fraction: float) -> None:
        """Show the number of done items and their fraction of all."""


def bar_for(console: Console) -> Bar:
    """Choose a progress bar for a terminal, and lines at intervals for anything else."""
    if console.is_terminal and not console.is_dumb_terminal:
        return _TerminalBar(console)
    return _PlainBar(console)


class _Speed:
    """Speed over the last calls, from a growing count."""

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
            TextColumn("{task.fields[counts]}", style="bold"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, counts="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, fraction: float) -> None:
        counts = f"{done:,}  {self._speed.per_second(what, done):,.0f}/s"
        self._progress.update(
            self._task, description=what, completed=min(1.0, fraction), counts=counts
        )


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


LINE_EVERY_SECONDS = 10.0
"""Shortest time between two lines of one stage if stderr is not a terminal."""


class TrainingProgress:
    """A progress bar of a training on a terminal, else plain lines.

    Use it as a context manager::

        with TrainingProgress() as progress:
            train(settings, output, progress.report)
    """

    def __init__(self, console: Console | None = None, command: str = "train") -> None:
        self._console = console or Console(stderr=True)
        self._command = command
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=1.0, left="", note="")
        self._began = time.monotonic()
        self._line_at = -LINE_EVERY_SECONDS
        self._line_stage = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def report(self, report: Report) -> None:
        """Show a report of :func:`model.training.train.train`."""
        elapsed = time.monotonic() - self._began
        left = time_left(elapsed, report.done)
        if report.lasting:
            self._console.print(f"{self._command}: {report.note}", highlight=False, soft_wrap=True)
            return
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                completed=report.done,
                description=report.stage,
                left=left,
                note=report.note,
            )
        elif report.stage != self._line_stage or elapsed - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at, self._line_stage = elapsed, report.stage
            line = f"{self._command}: {report.done:4.0%} {report.stage}"
            extra = [text for text in (report.note, left) if text]
            self._console.print(", ".join([line, *extra]), highlight=False, soft_wrap=True)


def time_left(elapsed_seconds: float, done: float) -> str:
    """Estimate the time left at the pace so far; empty while it would be a guess.

    >>> time_left(60.0, 0.5), time_left(30.0, 0.02), time_left(90.0, 1.0)
    ('1:00 left', '', '')
    """
    if done < 0.06 or done >= 1.0:
        return ""
    seconds = round(elapsed_seconds * (1 - done) / done)
    return f"{seconds // 60}:{seconds % 60:02d} left"
