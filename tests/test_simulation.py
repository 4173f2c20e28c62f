"""Simulated runs with a failing broker and store, and planted bugs that such runs must find."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from random import Random
from typing import Any

import pytest
from faust.types import TP

from pipeline.settings import load_settings
from tests.fakes.memory import MemoryKafka
from tests.simulation.bugs import BUGS, Bug
from tests.simulation.clock import Host, Loop
from tests.simulation.group import Consumer, Coordinator, Member
from tests.simulation.network import Faults, Network
from tests.simulation.run import simulate, simulating
from tests.simulation.soak import soak

RUNS = 2_000

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/simulation.md"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_fails_nothing_is_lost_said_twice_or_applied_twice() -> None:
    """Check the real worker: its processors, ownership, agents and consumer."""
    found = soak(range(RUNS))

    assert found is None, (
        f"seed {found[0]}: {found[1]}; replay it: python -m tests.simulation --seed {found[0]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_planted_by_hand_is_found(bug: Bug) -> None:
    """Check that the auditor finds bugs, because only then does a clean run prove anything."""
    with simulating(), bug.planted():
        for seed in range(bug.runs_max):
            if simulate(seed, bug.parts).violation is not None:
                break
        else:
            pytest.fail(f"{bug.runs_max} runs did not find it")


@pytest.mark.slow
def test_a_seed_decides_all_of_a_run_whatever_ran_before_it() -> None:
    """Check that a seed replays the same in another process and after other runs."""
    seed = 11
    command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed)]
    replayed = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    with simulating():
        for other in range(3):
            simulate(other)
        trace = simulate(seed, trace=True).trace

    assert replayed.stdout.splitlines()[: len(trace)] == trace
    assert len(trace) > 50


@pytest.mark.slow
def test_a_run_has_most_kinds_of_what_can_happen() -> None:
    """Check that each event occurs in some of a few runs, because only then do runs test it."""
    happened: set[str] = set()
    effects = 0
    with simulating():
        for seed in range(40):
            result = simulate(seed)
            happened.update(result.events)
            effects += result.effects

    assert happened == {
        "produce",
        "label",
        "kill",
        "start",
        "stop_for_a_while",
        "terminate",
        "expel",
        "rebalance",
        "lose_data",
        "look_at_labels",
        "make_topic_again",
    }
    assert effects > 40 * 50


@pytest.mark.slow
def test_a_failing_seed_is_told_with_the_command_that_replays_it() -> None:
    """Check that the replay of a planted bug ends with the violation."""
    command = [sys.executable, "-m", "tests.simulation", "--seed", "0"]
    bug = next(bug for bug in BUGS if bug.runs == 1)

    replayed = subprocess.run(
        [*command, "--bug", bug.name], cwd=ROOT, capture_output=True, text=True, timeout=120
    )

    assert replayed.returncode == 1
    *_, wrong, violation, replay = replayed.stdout.splitlines()
    assert "WRONG: " in wrong
    assert violation == f"seed 0: {wrong.partition('WRONG: ')[2]}"
    assert replay == f'replay it:  python -m tests.simulation --seed 0 --bug "{bug.name}"'


def test_the_page_has_a_row_for_each_bug_with_the_run_that_finds_it() -> None:
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \| \d+ \|$", PAGE.read_text(), re.MULTILINE)

    assert {name: int(runs.replace(",", "")) for name, runs in rows} == {
        bug.name: bug.runs for bug in BUGS
    }


@pytest.mark.slow
def test_the_runs_that_find_a_bug_are_counted() -> None:
    bug = next(bug for bug in BUGS if bug.runs == 1)
    command = [sys.executable, "-m", "tests.simulation", "--bug", bug.name, "--seeds", "3"]

    counted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert counted.stdout == "3 of 3 runs find it, the first with seed 0\n"


class Alone:
    """Member that never joined its group, so the coordinator refuses its commits."""

    place = TP("transactions", 0)

    def __init__(self) -> None:
        self.loop = Loop(lambda: None)  # type: ignore[abstract]
        rng = Random(0)
        network = Network(self.loop, rng, Faults(), lambda: None, None)
        topics = ["transactions", "labels"]
        self.kafka = MemoryKafka(dict.fromkeys(topics, 1), lambda: 0)
        self.coordinator = Coordinator(self.loop, rng, network, topics, 1, lambda *_: None)
        self.member = Member(
            Host("worker"),
            self.loop,
            rng,
            network,
            self.coordinator,
            self.kafka,
            load_settings(topic_partitions=1),
            Consumer,
            lambda error: None,
        )
        self.consumer = self.member.consumer

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the member's process to its end."""
        with simulating():
            task = self.member.host.start(self.loop, work)
            self.loop.run(until=60.0)
        task.result()


def test_a_commit_that_was_refused_is_not_taken_for_what_is_committed() -> None:
    """Check that the consumer clears a refused commit, which Faust remembers as committed.

    A seek back after a dropped fetch would otherwise skip the records before it.
    """
    alone = Alone()
    consumer, place = alone.consumer, alone.place
    believed = []

    async def go() -> None:
        alone.member.thread.assign(1, [place])
        consumer._positions[place] = 5
        await consumer.commit()
        believed.append(dict(consumer._committed_offset))
        await consumer.perform_seek()

    alone.run(go())

    assert believed == [{place: 5}], "if Faust does so no more, nothing need be undone"
    assert alone.coordinator.committed == {}
    assert consumer._committed_offset.get(place) is None
    assert consumer._begin == {place: 0}


def test_a_fetch_of_the_time_before_does_not_move_a_new_group_past_what_it_has_not_read() -> None:
    """Check that a worker of a group without commits reads from the log's beginning."""
    alone = Alone()
    consumer, place = alone.consumer, alone.place
    for _ in range(3):
        alone.kafka.produce(place.topic, b"A", b"", partition=0)
    stale = alone.kafka.fetch(place.topic, 0, 2, 1)

    async def go() -> None:
        alone.member.thread.assign(1, [place])
        await consumer.perform_seek()
        consumer._give_up({place: stale})

    alone.run(go())

    assert alone.member.thread.positions == {place: 0}


def test_a_seek_back_is_not_undone_by_the_seek_to_what_is_committed() -> None:
    """Check that a seek back from the previous assignment survives, as no poll repeats it."""
    alone = Alone()
    consumer, place = alone.consumer, alone.place
    alone.coordinator.committed[place] = 2

    async def go() -> None:
        alone.member.thread.assign(1, [place])
        consumer.reread_from(place, 1)
        await consumer.perform_seek()

    alone.run(go())

    assert alone.member.thread.positions == {place: 1}
    assert consumer._begin == {place: 1}


def test_a_process_that_is_stopped_goes_on_later_and_a_dead_one_does_not() -> None:
    """Check the basis of zombies and kills in the runs."""
    loop = Loop(lambda: None)  # type: ignore[abstract]
    stopped, dead = Host("stopped"), Host("dead")
    stopped.stopped_until = 5.0
    woken: list[tuple[str, float]] = []

    async def work(host: Host) -> None:
        await asyncio.sleep(1.0)
        woken.append((host.name, loop.time()))

    for host in (stopped, dead):
        host.start(loop, work(host))
    loop.later(0.5, setattr, dead, "is_dead", True)
    loop.run(until=100.0)
    loop.close_tasks(dead.tasks)

    assert woken == [("stopped", 6.0)]
