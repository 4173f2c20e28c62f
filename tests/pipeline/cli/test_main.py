"""Commands import only what they need: torch takes seconds and 200 MB."""

from __future__ import annotations

import dis
import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from pipeline.cli.main import main, recur

LEARNING = {"train", "evaluate", "probe", "train-generator", "evaluate-generator"}
"""Commands that compute gradients or compare networks."""

IMPORT_ALL = """
import importlib, json, sys
found = {}
for command, modules in json.loads(sys.argv[1]).items():
    for module in modules:
        importlib.import_module(module)
    found[command] = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
print(json.dumps(found))
"""

SCORE_ONCE = """
import sys
import numpy as np
from pipeline.checkpoint import load_checkpoint
from pipeline.scoring.scorer import MicroBatch, scorer_of
from pipeline.settings import load_settings
from model.features.merchant import MERCHANT_FEATURES

settings = load_settings()
checkpoint = load_checkpoint(settings)
one = np.ones(1, np.int64)
fields = np.zeros((1, len(checkpoint.header.features.fields)), np.float32)
merchant = np.zeros((1, len(MERCHANT_FEATURES)), np.float32)
batch = MicroBatch(one - 1, one * 9.5, one, one, one, one.astype(np.uint64), merchant, fields,
                   np.zeros(1, np.float32))
_, scores, _, _ = scorer_of(settings, checkpoint).score([None], batch)
print(len(scores.score), "torch" in sys.modules)
"""


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield each command with its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def imported_by(command: click.Command) -> list[str]:
    """Return the modules that a command imports when it runs."""
    assert command.callback is not None
    code = dis.get_instructions(command.callback)
    return [i.argval for i in code if i.opname == "IMPORT_NAME"]


COMMANDS = {name: imported_by(command) for name, command in commands(recur)}


def loaded(modules: dict[str, list[str]], heavy: list[str]) -> dict[str, list[str]]:
    """Import each command's modules in a new process; return which heavy ones it has after each."""
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(modules), json.dumps(heavy)],
        capture_output=True,
        check=True,
        text=True,
    )
    found: dict[str, list[str]] = json.loads(answer.stdout)
    return found


def test_no_command_but_the_learning_ones_imports_torch() -> None:
    others = {name: modules for name, modules in COMMANDS.items() if name not in LEARNING}
    assert {"state show", "account", "verify", "worker", "state forget"} <= others.keys()

    assert [name for name, found in loaded(others, ["torch"]).items() if found] == []


def test_a_checkpoint_is_loaded_and_applied_without_torch() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", SCORE_ONCE], capture_output=True, check=True, text=True
    )

    assert answer.stdout.split() == ["1", "False"]


def test_only_the_worker_imports_faust() -> None:
    others = {name: m for name, m in COMMANDS.items() if name not in {*LEARNING, "worker"}}

    assert [name for name, found in loaded(others, ["faust"]).items() if found] == []


def test_a_command_that_imports_torch_is_found() -> None:
    assert loaded({"probe": COMMANDS["probe"]}, ["torch"]) == {"probe": ["torch"]}


def test_help_imports_neither_numpy_nor_a_client() -> None:
    found = loaded(
        {"help": ["pipeline.cli.main"]}, ["torch", "numpy", "faust", "redis", "aiokafka"]
    )

    assert found == {"help": []}


def test_a_gateway_without_its_packages_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "litestar", None)  # as if it were not installed
    with pytest.raises(SystemExit) as ended:
        main(["gateway"])

    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "recur: the gateway needs the package litestar: pip install 'recur[gateway]'\n"
    )
