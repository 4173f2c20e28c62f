"""Shows the progress of a training on stderr, with the time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from model.training.train import Report

LINE_EVERY_SECONDS = 10.0
"""Where stderr is not a terminal a line is written no more often, but for a new stage."""


class TrainingProgress:
    """A progress bar on a terminal, else plain lines. Use it as a context manager:

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
        """Shows a report of :func:`model.training.train.train`."""
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
    """What is left at the pace so far; nothing while that is a guess.

    >>> time_left(60.0, 0.5), time_left(30.0, 0.02), time_left(90.0, 1.0)
    ('1:00 left', '', '')
    """
    if done < 0.06 or done >= 1.0:
        return ""
    seconds = round(elapsed_seconds * (1 - done) / done)
    return f"{seconds // 60}:{seconds % 60:02d} left"
