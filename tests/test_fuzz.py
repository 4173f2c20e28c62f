"""Short fuzz runs on every decoder, and a replay of all inputs that once found something."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.engine import run_mutations
from tests.fuzz.guard import CORPUS, Guard, corpus
from tests.fuzz.targets import TARGETS, Target

# Numbers of a forged state may overflow before the decoder refuses it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INPUTS = {"transaction": 6000, "label": 6000, "watermark": 6000, "profile": 3000}
INPUTS |= {"state": 1500, "checkpoint": 3000}
SEED = 20_251


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_thousand_inputs_find_nothing(name: str) -> None:
    """Check that inputs only raise declared errors, within bounds, and accepted ones are usable."""
    guard = Guard(TARGETS[name], INPUTS[name])

    run_mutations(TARGETS[name], guard, SEED, corpus(TARGETS[name]))

    assert not guard.findings, "\n".join(guard.findings.values())
    assert guard.count == INPUTS[name]
    accepted = sum(n for outcome, n in guard.outcomes.items() if "accepted" in outcome)
    assert 0.005 < accepted / guard.count < 0.9, "all or none of it is of the right form"


def test_the_same_seed_gives_the_same_inputs() -> None:
    """Check that a finding can be reproduced from its seed."""
    runs: list[list[bytes]] = [[], [], []]
    for inputs, seed in zip(runs, (1, 1, 2), strict=True):

        def note(data: bytes, inputs: list[bytes] = inputs) -> str:
            inputs.append(data)
            return TARGETS["checkpoint"].run(data)

        target = TARGETS["checkpoint"]
        noted = Target(target.name, note, target.seeds, target.mutate, target.memory_bytes)
        run_mutations(noted, Guard(noted, 300), seed, [])

    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_what_found_something_once_finds_nothing_now(path: Path) -> None:
    """Replay an input that once crashed a decoder or exceeded a bound."""
    guard = Guard(TARGETS[path.parent.name], 1)

    guard.run(path.read_bytes())

    assert not guard.findings, "\n".join(guard.findings.values())


def _attack(data: bytes) -> str:
    match data[:1]:
        case b"c":
            raise KeyError(data)
        case b"m":
            return str(len(bytearray(1 << 30)))
        case _:
            return "accepted"


def _any_of(data: bytes, random: Random) -> bytes:
    return random.choice((b"c", b"m", b"good"))


def test_the_guard_bites(tmp_path: Path) -> None:
    """Check that the guard finds a crash and a large allocation, once each, and keeps both."""
    target = Target("weak", _attack, (b"good",), _any_of, 1 << 28)
    guard = Guard(target, 200, found=tmp_path, out=None)

    run_mutations(target, guard, 1, [])

    found = {place.partition(" ")[0] for place in guard.findings}
    bounded = {"MemoryError"} if sys.platform == "linux" else set()
    assert found == {"KeyError"} | bounded
    kept = {path.read_bytes() for path in (tmp_path / "weak").iterdir()}
    assert kept == ({b"c", b"m"} if bounded else {b"c"})
    assert "2 findings" in guard.summary() or not bounded
