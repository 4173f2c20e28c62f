"""The documents agree with the code: paths, links, settings, metrics, commands and sizes."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from prometheus_client import CollectorRegistry

from pipeline.cli.main import recur
from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.scoring.metrics import Metrics
from pipeline.settings import CONFIG_VARIABLE, RENAMED, Settings
from pipeline.webhooks.metrics import WebhookMetrics

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
EACH_PAGE_OF_TODAY = pytest.mark.parametrize(
    "page", OF_TODAY, ids=lambda page: str(page.relative_to(ROOT))
)

FOLDERS = ("benchmarks", "deploy", "docs", "examples", "model", "pipeline", "requirements", "tests")
OLD_WORDS = re.compile(r"genuine|further fields|\brekey\b", re.I)
LINES_MAX = {"README.md": 250, "ARCHITECTURE.md": 110}
TERMS_MAX = 40


def code_in(page: Path) -> Iterator[str]:
    """Each piece of inline code of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", text)


@EACH_PAGE_OF_TODAY
def test_every_path_in_a_document_exists(page: Path) -> None:
    paths = [
        code
        for code in code_in(page)
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+", code) and "NNNN" not in code
    ]
    missing = [path for path in paths if not (ROOT / path).exists()]

    assert not missing


@EACH_PAGE_OF_TODAY
def test_every_test_in_a_document_exists(page: Path) -> None:
    named = {code for code in code_in(page) if re.fullmatch(r"test_\w+", code)}

    assert named <= names_of_tests()


@cache
def names_of_tests() -> set[str]:
    """Names of all test functions."""
    files = (ROOT / "tests").rglob("*.py")
    return {name for file in files for name in re.findall(r"def (test_\w+)\(", file.read_text())}


@EACH_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)

    assert not broken


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@EACH_PAGE_OF_TODAY
def test_every_setting_in_a_document_exists(page: Path) -> None:
    known = {f"RECUR_{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    if page.name == "settings.md":  # it ends with the table of renamed settings
        known |= {f"RECUR_{name.upper()}" for name in RENAMED}
    named = set(re.findall(r"\bRECUR_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()))

    assert named <= known


@EACH_PAGE_OF_TODAY
def test_every_metric_in_a_document_exists(page: Path) -> None:
    named = re.findall(r"`(recur_\w+?)(?:_total|_bucket|_info)?(?:\{[^`]*\})?`", page.read_text())

    assert set(named) <= names_of_metrics()


@cache
def names_of_metrics() -> set[str]:
    """Names of all processes' metrics, without the endings of their types."""
    registries = (
        Metrics(CollectorRegistry()).registry,
        GatewayMetrics().registry,
        WebhookMetrics(CollectorRegistry()).registry,
    )
    return {family.name for registry in registries for family in registry.collect()}


@EACH_PAGE_OF_TODAY
def test_every_command_in_a_document_exists(page: Path) -> None:
    for words in re.findall(r"(?:`|\$ )recur ([a-z][a-z -]*[a-z])", page.read_text()):
        group: click.Command = recur
        for word in words.split():
            if not isinstance(group, click.Group):
                break
            assert word in group.commands, f"recur {words}"
            group = group.commands[word]


@EACH_PAGE_OF_TODAY
def test_no_document_uses_a_word_that_was_replaced(page: Path) -> None:
    if page.name not in ("settings.md", "commands.md"):
        assert not OLD_WORDS.findall(page.read_text())


def test_the_changelog_lists_every_renamed_setting() -> None:
    rows = (ROOT / "CHANGELOG.md").read_text().splitlines()
    for old, new in RENAMED.items():
        pair = f"RECUR_{old.upper()}", f"RECUR_{new.upper()}"
        assert any(all(name in row for name in pair) for row in rows), old


@pytest.mark.parametrize("name", LINES_MAX)
def test_the_first_pages_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= LINES_MAX[name]


def test_the_glossary_is_short_and_sorted() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    terms = rows[1:]

    assert len(terms) <= TERMS_MAX
    assert terms == sorted(terms)


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name}" in index, page.name


@pytest.mark.parametrize("script", ["docs/generate.py", "docs/draw_recurrent.py"])
def test_the_reference_is_what_the_code_says(script: str) -> None:
    """Run it in a process of its own, as `make docs` does: other tests import much."""
    checked = subprocess.run(
        [sys.executable, ROOT / script, "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert checked.returncode == 0, checked.stderr


def test_a_page_that_is_not_current_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "docs/generate.py"))["main"]
    main.__globals__["FOLDER"] = tmp_path
    assert main(check=False) == 0
    (tmp_path / "reference/metrics.md").write_text("# Metrics of last year\n")

    assert main(check=True) == 1
    assert capsys.readouterr().err.startswith("docs/reference/metrics.md: not current")
