"""Tests of the progress display."""

from __future__ import annotations

import io

from rich.console import Console

from pipeline.progress import Bar, time_left


def test_a_file_gets_a_line_at_each_stage_and_then_at_intervals() -> None:
    out = io.StringIO()
    with Bar(Console(file=out), "verify") as bar:
        bar.show("reading", 10, 0.01)
        bar.show("reading", 20, 0.02)
        bar.show("comparing", 5, 1.2)
        bar.print_line("7 rows dropped")
    reading, comparing, dropped = out.getvalue().splitlines()
    assert reading.startswith("verify:   1% reading, 10  ")
    assert comparing.startswith("verify: 100% comparing, 5  ")
    assert dropped == "verify: 7 rows dropped"


def test_a_terminal_gets_a_bar_with_count_and_speed() -> None:
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=100)) as bar:
        bar.show("reading", 12_345, 0.5)
    assert "reading" in out.getvalue()
    assert "50%" in out.getvalue()
    assert "12,345" in out.getvalue()


def test_the_time_left_is_no_guess() -> None:
    assert time_left(100.0, 0.25) == "5:00 left"
    assert time_left(100.0, 0.01) == ""
