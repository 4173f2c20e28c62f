"""The demo's view fits the terminal, and plain output has no control characters."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.demo.gauges import Latency, Rates
from pipeline.demo.view import (
    AlertLine,
    DemoSummary,
    DetectionRate,
    LiveDisplay,
    PlainDisplay,
    Scene,
    clock,
    display_for,
    milliseconds,
    render,
    summary_view,
)
from pipeline.local.worker_metrics import LATENCY

ALERT = AlertLine(1_534_334_400_000, "A0001234", "M0001234", 1812.4, 0.973, "decline", 2)


def scene(alerts: int = 20) -> Scene:
    return Scene(
        phase="live",
        explained="one second here is 75 simulated minutes",
        done=0.4,
        progress="6,012 of 15,000 scored",
        rate_in=500.0,
        rate_out=499.0,
        waiting=12_345,
        scored=206_012,
        p50_seconds=0.0018,
        p99_seconds=12.5,
        event_ms=1_534_334_400_000,
        caught=34,
        missed=12,
        alerts=41,
        false_alerts=7,
        rates_out=[float(n) for n in range(300)],
        recent=[ALERT] * alerts,
        workers=["worker 1", "worker 2"],
        http_requests=240,
        http_errors=3,
        http_p50_seconds=0.0112,
        http_p99_seconds=0.04,
        addresses=["http://127.0.0.1:41233/metrics", "http://127.0.0.1:41234/metrics"],
    )


SUMMARY = DemoSummary(
    [("transactions", "408,253: lost 0, scored twice 0, rejected 0"), ("live", "15,000 at 500/s")],
    [DetectionRate("amount over 220", 12, 13), DetectionRate("stolen card", 0, 0)],
    ["worker 1: 203,102 transactions"],
    [],
)


def drawn(width: int, height: int, alerts: int = 20) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, color_system=None, highlight=False)
    console.print(render(scene(alerts), width, height))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (200, 60), (60, 18), (76, 16), (40, 12)])
@pytest.mark.parametrize("alerts", [0, 3, 20])
def test_the_view_is_never_larger_than_the_terminal(size: tuple[int, int], alerts: int) -> None:
    width, height = size
    lines = drawn(width, height, alerts)

    assert len(lines) < height or height < 15
    assert all(len(line) <= width for line in lines)


def test_80_by_24_shows_everything() -> None:
    text = "\n".join(drawn(80, 24))

    assert "HTTP 240 requests, p50 11.2 ms, p99 40.0 ms, errors 3" in text
    for shown in ("500/s", "1.8 ms", "12.5 s", "12,345", "34", "2018", "A0001234", "M0001234",
                  "1,812.40", "0.973", "decline", "skimmed terminal", "127.0.0.1:41234",
                  "Ctrl-C", "6,012 of 15,000"):  # fmt: skip
        assert shown in text


def test_the_number_of_alerts_does_not_move_the_lines_below() -> None:
    assert len(drawn(80, 24, 0)) == len(drawn(80, 24, 5)) == len(drawn(80, 24, 20))


def test_alerts_stand_in_columns_whatever_their_amounts_are() -> None:
    shown = scene()
    shown.recent = [ALERT, replace(ALERT, amount=1_234_567.25, decision="review")]
    file = io.StringIO()
    Console(file=file, width=100, color_system=None).print(render(shown, 100, 30))
    header, *alerts = (line for line in file.getvalue().splitlines() if "0.973" in line
                       or "decision" in line)  # fmt: skip

    end = header.index("amount") + len("amount")
    assert [line[end - 12 : end].strip() for line in alerts] == ["1,812.40", "1,234,567.25"]
    for line in alerts:
        assert line.index("A0001234") == header.index("account")
        assert line.index("skimmed terminal") == header.index("truth")


def test_plain_output_is_text_without_many_lines() -> None:
    file = io.StringIO()
    display = display_for(Console(file=file, width=80))
    assert isinstance(display, PlainDisplay)
    display.heading("Recur")
    display.done("workers", "ready")
    for _ in range(50):
        display.show(scene())
    display.note("worker 1 was killed by SIGKILL", bad=True)
    display.summary(SUMMARY)
    display.close()
    text = file.getvalue()

    assert text.count("6,012 of 15,000 scored") == 1
    assert "every transaction was scored exactly once" in text
    assert "\x1b" not in text
    assert "\r" not in text


def test_a_terminal_gets_the_live_view_until_the_end() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    display = display_for(console)
    assert isinstance(display, LiveDisplay)
    display.working("starting")
    display.show(scene())
    display.done("live", "15,000 transactions")
    display.summary(SUMMARY)
    display.close()

    assert "\x1b[2K" in file.getvalue()  # erased lines
    assert "15,000 transactions" in file.getvalue()


def test_a_summary_with_faults_names_them() -> None:
    file = io.StringIO()
    bad = DemoSummary(
        SUMMARY.rows, [], [], ["3 never scored (burst)", "1 scored more than once (live)"]
    )
    Console(file=file, width=80).print(summary_view(bad))

    assert "3 never scored (burst); 1 scored more than once (live)" in file.getvalue()
    assert "exactly once" not in file.getvalue()


def test_durations_are_formatted_for_people() -> None:
    assert [milliseconds(s) for s in (None, 0.0018, 0.0999, 0.25, 3.2, 12.14)] == [
        "–", "1.8 ms", "99.9 ms", "250 ms", "3,200 ms", "12.1 s",
    ]  # fmt: skip
    assert [clock(s) for s in (7, 61.9, 3723)] == ["0:07", "1:01", "1:02:03"]


def test_latency_counts_from_its_reset_and_keeps_the_counts_of_a_dead_worker() -> None:
    class Worker:
        def __init__(self, *counts: int) -> None:
            self.set_counts(*counts)

        def set_counts(self, *counts: int) -> None:
            bounds = ("0.001", "0.01", "+Inf")
            self.samples = {
                f'{LATENCY}_bucket{{le="{le}"}}': float(n)
                for le, n in zip(bounds, counts, strict=True)
            }

    first, second = Worker(100, 100, 100), Worker(0, 0, 0)
    latency = Latency([first, second])  # type: ignore[list-item]
    assert latency.overall(0.5) is not None
    latency.reset()
    assert latency.overall(0.5) is None
    first.set_counts(100, 110, 110)
    second.set_counts(0, 10, 10)

    assert latency.overall(0.5) == pytest.approx(0.0055)
    assert latency.recent(1.0) == pytest.approx(0.01)


def test_rates_cover_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("pipeline.demo.gauges.time.monotonic", lambda: now[0])
    rates = Rates(0, 0)
    seen = []
    for second in range(1, 11):
        now[0] += 1
        seen.append(rates.add(sent=1000 * second, scored=500 * second if second < 8 else 4000))

    assert seen[4] == (1000.0, 500.0)
    assert seen[9][0] == 1000.0
    assert seen[9][1] == 0.0
