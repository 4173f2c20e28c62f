"""Progress of anything that takes longer than two seconds.

A terminal shows a bar. Anything else gets a line at each new stage, and one at intervals.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from typing import Self

    from model.training.settings import Report

LINE_EVERY_SECONDS = 10.0
"""Shortest time between two lines of one stage."""

GUESS_UNDER = 0.06
"""Share of the work below which the time left would be a guess."""


class Bar:
    """A display of progress, as a context manager.

    Args:
        console: a terminal, or not.
        command: begins each line, if the console is no terminal.
    """

    def __init__(self, console: Console, command: str = "") -> None:
        self._console = console
        self._prefix = f"{command}: " if command else ""
        self._has_bar = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description:>18}", style="dim"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}", style="bold"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task("starting", total=1.0, note="", left="")
        self._began = time.monotonic()
        self._line_at = self._began - LINE_EVERY_SECONDS
        self._line_stage = ""
        self._marks: list[tuple[float, int]] = []
        self._marks_stage = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, stage: str, done: int, fraction: float) -> None:
        """Show the number of done items, their speed, and their fraction of all."""
        self.update(stage, fraction, f"{done:,}  {self._per_second(stage, done):,.0f}/s")

    def update(self, stage: str, fraction: float, note: str = "") -> None:
        """Show a stage, the fraction of all work that is done, and a note."""
        now = time.monotonic()
        left = time_left(now - self._began, fraction)
        if self._has_bar:
            self._bar.update(
                self._task, description=stage, completed=min(1.0, fraction), note=note, left=left
            )
        elif stage != self._line_stage or now - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at, self._line_stage = now, stage
            first = f"{min(1.0, fraction):4.0%} {stage}"
            self.print_line(", ".join(text for text in (first, note, left) if text))

    def print_line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(self._prefix + text, highlight=False, soft_wrap=True)

    def _per_second(self, stage: str, done: int) -> float:
        """Compute the speed over the last calls of the stage."""
        now = time.monotonic()
        if stage != self._marks_stage:
            self._marks_stage, self._marks = stage, []
        self._marks = [*self._marks[-10:], (now, done)]
        then, before = self._marks[0]
        return (done - before) / (now - then) if now > then else 0.0


class TrainingProgress(Bar):
    """A display of the reports of a training, an evaluation or a probe.

    Use it as a context manager::

        with TrainingProgress() as progress:
            train(settings, output, progress.report)
    """

    def __init__(self, console: Console | None = None, command: str = "train") -> None:
        super().__init__(console or Console(stderr=True), command)

    def report(self, report: Report) -> None:
        """Show a report of :func:`model.training.train.train`."""
        if report.lasting:
            self.print_line(report.note)
        else:
            self.update(report.stage, report.done, report.note)


def time_left(elapsed_seconds: float, done: float) -> str:
    """Estimate the time left at the pace so far; empty while it would be a guess.

    >>> time_left(60.0, 0.5), time_left(30.0, 0.02), time_left(90.0, 1.0)
    ('1:00 left', '', '')
    """
    if done < GUESS_UNDER or done >= 1.0:
        return ""
    seconds = round(elapsed_seconds * (1 - done) / done)
    return f"{seconds // 60}:{seconds % 60:02d} left"
