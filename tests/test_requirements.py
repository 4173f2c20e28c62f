"""pyproject.toml, the pinned files and the imports in the code agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
EMBEDDED = [Requirement(text) for text in PROJECT["optional-dependencies"]["embedded"]]
EVALUATE = [Requirement(text) for text in PROJECT["optional-dependencies"]["evaluate"]]
EXTRAS = [
    Requirement(text)
    for extra in ("gateway", "jwt", "tracing")
    for text in PROJECT["optional-dependencies"][extra]
]
DEV = [Requirement(text) for text in PYPROJECT["dependency-groups"]["dev"]]
PINNED_FILES = ("bootstrap", "torch", "runtime", "redis", "evaluate", "dev")
PEERS = [
    Requirement(line)
    for line in (ROOT / "requirements/peers.in").read_text().splitlines()
    if not line.startswith("#")
]
OURS = {"benchmarks", "model", "pipeline", "recur_client", "tests"}


def pins(file: str) -> dict[str, str]:
    """Version by package in one of the pinned files."""
    text = (ROOT / f"requirements/{file}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def imported_packages(folder: str) -> dict[frozenset[str], str]:
    """Distributions that have a package of an import, each with a file that imports it.

    Several distributions share a namespace package: one of them has to be declared.
    """
    distributions = packages_distributions()
    needed: dict[frozenset[str], str] = {}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for top in {module.partition(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top not in OURS:
                    having = frozenset(map(canonicalize_name, distributions.get(top, [top])))
                    needed[having] = str(file.relative_to(ROOT))
    return needed


def test_every_requirement_is_pinned_at_a_version_that_it_allows() -> None:
    pinned = {name: version for file in PINNED_FILES for name, version in pins(file).items()}
    for requirement in [*RUNTIME, *EMBEDDED, *EVALUATE, *EXTRAS, *DEV]:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not pinned: run `make requirements`"
        assert requirement.specifier.contains(version), f"{requirement}: run `make requirements`"


def test_workers_and_gateways_need_nothing_from_the_files_for_demo_and_tests() -> None:
    assert names(RUNTIME) | names(EXTRAS) <= pins("torch").keys() | pins("runtime").keys()


def test_no_package_is_pinned_in_two_files() -> None:
    seen: dict[str, str] = {}
    for file in PINNED_FILES:
        for name in pins(file):
            assert seen.setdefault(name, file) == file, name


def test_only_its_own_file_pins_torch_and_what_another_build_replaces() -> None:
    assert "torch" in pins("torch")
    for file in set(PINNED_FILES) - {"torch"}:
        assert not [n for n in pins(file) if re.match(r"nvidia-|cuda-|triton$|torch$", n)]


def test_the_peers_of_the_benchmark_are_pinned_with_hashes() -> None:
    pinned = pins("peers")
    for requirement in PEERS:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: run `make requirements`"
    text = (ROOT / "requirements/peers.txt").read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) >= len(pinned)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_peers_take_torch_from_the_main_environment() -> None:
    assert not [n for n in pins("peers") if re.match(r"nvidia-|cuda-|triton$|torch$", n)]


@pytest.mark.parametrize(
    ("folder", "declared"),
    [
        ("model", names(RUNTIME) | names(EVALUATE)),
        ("pipeline", names(RUNTIME) | names(EMBEDDED) | names(EXTRAS)),
        ("tests", names([*RUNTIME, *EMBEDDED, *EVALUATE, *EXTRAS, *DEV])),
        ("benchmarks", names([*RUNTIME, *EMBEDDED, *EXTRAS, *DEV]) | pins("peers").keys()),
        ("docs", names(RUNTIME) | names(DEV)),
        ("examples", names(RUNTIME)),
    ],
)
def test_every_import_is_declared(folder: str, declared: set[str]) -> None:
    imported = imported_packages(folder)

    assert imported
    assert not {tuple(having): file for having, file in imported.items() if not having & declared}


def test_an_audit_looks_every_pinned_file_up_and_no_package_twice_in_one_run() -> None:
    printed = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.project-installed", "audit"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    pinned = {f"requirements/{file.name}" for file in (ROOT / "requirements").glob("*.txt")}
    runs = re.findall(r'"(--requirement [^"]+)"', printed)
    files = [run.split()[1::2] for run in runs]

    assert sorted(file for run in files for file in run) == sorted(pinned)
    for run in files:  # pip-audit refuses a package that stands twice
        names_of_run = [n for file in run for n in pins(Path(file).stem)]
        assert len(names_of_run) == len(set(names_of_run))
