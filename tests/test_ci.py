"""CI and the hooks of a commit run what make runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
HOOKS: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
STEPS = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


def targets(text: str) -> set[str]:
    """Make targets that a text calls."""
    return set(re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE))


def test_every_step_of_the_workflow_is_a_target_of_make() -> None:
    for step in STEPS:
        (target,) = targets(step)
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), step


def test_the_workflow_runs_what_must_pass_before_a_change_lands() -> None:
    before_a_change = targets((ROOT / ".ci/run").read_text())

    assert before_a_change
    assert before_a_change <= targets("\n".join(STEPS))


def test_the_hooks_call_the_environment_that_make_creates_and_fetch_nothing() -> None:
    (repository,) = HOOKS["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def test_make_check_runs_every_hook_but_that_of_the_commit_message() -> None:
    (check,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    for hook in HOOKS["repos"][0]["hooks"]:
        tool = hook["entry"].split()[0].rpartition("/")[2]
        assert "commit-msg" in hook.get("stages", []) or f"$(BIN)/{tool}" in check, hook["id"]
