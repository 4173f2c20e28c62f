"""The demo succeeds, counts every score, and leaves nothing behind, even when interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from pipeline.demo.http_traffic import divide
from pipeline.demo.run import INTERRUPTED, DemoOptions, run_demo
from pipeline.demo.stage import Phase
from pipeline.errors import SettingsError, StartupError
from pipeline.extras import GATEWAY_PACKAGES
from pipeline.replay.score_counter import ScoreCounter
from pipeline.replay.simulated import SimulatedStream

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_SECONDS = 180


class Run:
    """A short demo as a process, with its output in a pipe."""

    def __init__(self, directory: Path, **options: object) -> None:
        self.mark = f"RECUR-TEST-{uuid.uuid4().hex}"
        self.directory = directory
        call = ", ".join(f"{name}={value!r}" for name, value in options.items())
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from pipeline.demo.run import DemoOptions, run_demo;"
                f"sys.exit(run_demo(DemoOptions({call})))",
            ],
            cwd=ROOT,
            env=os.environ | {"TEST_MARK": self.mark, "TMPDIR": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, text: str) -> str:
        """Read until a line has this text, and return what was read."""
        assert self.process.stdout is not None
        read = ""
        for line in self.process.stdout:
            read += line
            if text in line:
                return read
        raise AssertionError(f"{text!r} was not printed:\n{read}")

    def end(self) -> str:
        """Read the rest of the output."""
        return self.process.communicate(timeout=TIMEOUT_SECONDS)[0]

    def left_running(self) -> list[str]:
        """List the processes of the demo that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it has ended, or belongs to another user
        return found

    def assert_nothing_left(self) -> None:
        """Check that no process and no file is left."""
        deadline = time.monotonic() + 60  # a moment, but on a busy machine
        while self.left_running() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.left_running() == []
        assert list(self.directory.iterdir()) == []


@pytest.mark.live
def test_the_demo_scores_everything_exactly_once_and_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, transactions=20_000, rate=200, seconds=4, history_days=2)
    text = run.until("curl ")
    command = text.splitlines()[-1]
    answers = [
        json.loads(subprocess.run(command, shell=True, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    text += run.end()

    assert run.process.returncode == 0, text
    total = int(re.findall(r"transactions +([\d,]+): lost 0, scored twice 0, rejected 0", text)[0]
                .replace(",", ""))  # fmt: skip
    assert total > 20_800 + 2 * 5_000
    assert "every transaction was scored exactly once" in text
    assert len(re.findall(r"http://127\.0\.0\.1:\d+/metrics", text)) == 2
    assert re.search(r"live +800 at \d+/s: p50 [\d.,]+ ms", text)
    assert re.search(r"labels +[\d,]+ frauds became known, each 7 simulated days late", text)
    assert re.search(r"states +[\d,]+ accounts of \d+ B, [\d,]+ merchants of \d+ B", text)
    assert re.search(r"burst +20,000 in [\d.]+ s: [\d,]+/s by 2 workers", text)
    scored = [
        int(n.replace(",", "")) for n in re.findall(r"worker \d: ([\d,]+) transactions", text)
    ]
    assert sum(scored) == total + len(answers)
    assert len({answer["transaction_id"] for answer in answers}) == 2
    assert all(0 <= answer["score"] <= 1 for answer in answers)
    posted, errors = re.findall(
        r"HTTP +(\d+) of the live ones [^:]*:"
        r"\s+p50 [\d.,]+ m?s,\s+p99\s+[\d.,]+\s+m?s,\s+errors (\d+)",
        text,
    )[0]
    assert (0 < int(posted) < 800, errors) == (True, "0")
    assert "\x1b" not in text
    run.assert_nothing_left()


@pytest.mark.live
@pytest.mark.parametrize("moment", ["starting Kafka", "starting 1 worker", "live "])
def test_ctrl_c_ends_the_demo_at_any_time_and_leaves_nothing(moment: str, tmp_path: Path) -> None:
    run = Run(tmp_path, transactions=1_000, rate=200, seconds=60, history_days=0, workers=1)
    run.until(moment)
    run.process.send_signal(signal.SIGINT)
    text = run.end()

    assert run.process.returncode == INTERRUPTED, text
    assert "stopped" in text
    assert "Traceback" not in text
    run.assert_nothing_left()


@pytest.mark.live
def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    run = Run(tmp_path, transactions=1_000, seconds=60, history_days=0, workers=1)
    run.until("live ")
    run.process.kill()
    run.end()

    deadline = time.monotonic() + 60
    while run.left_running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert run.left_running() == []


@pytest.mark.live
def test_a_worker_that_cannot_start_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECUR_CHECKPOINT", str(tmp_path / "nothing.safetensors"))
    (tmp_path / "temporary").mkdir()
    run = Run(tmp_path / "temporary", workers=1)
    text = run.end()

    assert run.process.returncode == 1
    assert re.search("ServiceError: (worker 1|gateway) ended with exit status", text), text
    assert "nothing.safetensors" in text
    assert run.left_running() == []


def test_requests_are_a_small_part_and_keep_the_order_of_an_account() -> None:
    transactions = SimulatedStream(500, 1000, "2020-01-01", seed=1).take(2_000)
    blocks = list(transactions.blocks())
    part = divide(blocks, transactions.columns.account, rate=500)

    values = [value for block in blocks for value in block.values]
    assert sorted([*part.fed.values, *part.posted.values]) == sorted(values)
    assert 40 < len(part.posted.values) < 120  # 20/s of 500/s
    assert not set(part.fed.keys) & set(part.posted.keys)
    assert part.posted.due_seconds is not None
    assert (part.posted.due_seconds[1:] > part.posted.due_seconds[:-1]).all()
    lane_of = dict(zip(part.posted.keys, part.lanes.tolist(), strict=True))
    assert [lane_of[key] for key in part.posted.keys] == part.lanes.tolist()


def test_lost_duplicate_and_unalerted_transactions_are_faults() -> None:
    transactions = SimulatedStream(50, 1000, "2020-01-01", seed=1).take(6)
    counter = ScoreCounter(6, transactions.index_of)
    phase = Phase("live", transactions, counter, 0, 0, 0)
    counter.times[:] = 1
    counter.decisions[:] = [2, 1, 0, 0, 0, 0]
    phase.alerted[:2] = True
    assert phase.faults() == []

    phase.alerted[1] = False
    counter.times[3:] = [0, 0, 2]
    counter.unknown = 7
    phase.rejected = 1
    assert phase.faults() == [
        "1 never scored (live)",
        "1 rejected (live)",
        "1 scored more than once (live)",
        "7 scored again later (live)",
        "1 declined or reviewed without an alert (live)",
    ]
    phase.warm = True
    assert "without an alert" not in " ".join(phase.faults())


@pytest.mark.parametrize("package", GATEWAY_PACKAGES)
def test_without_the_gateways_packages_the_demo_says_what_to_install_and_starts_nothing(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setattr("pipeline.demo.run.embedded", None)
    with pytest.raises(StartupError, match=rf"{package}: pip install 'recur\[gateway\]'$"):
        run_demo(DemoOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": 0}, "--workers is 0"), ({"rate": 0.5}, "--rate"), ({"seconds": 1e9}, "3,600")],
)
def test_wrong_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DemoOptions(**options)  # type: ignore[arg-type]
