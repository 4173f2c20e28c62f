"""The wheel holds everything: it is built, installed without the source tree, and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "pipeline")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
WHERE = "import model, pipeline; print(model.__file__, pipeline.__file__, sep='\\n')"
LIMIT_SECONDS = 240.0


def run(command: list[str | Path], folder: Path) -> str:
    """Output of a command that ends well, without this project's path and settings."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RECUR_", "PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, timeout=LIMIT_SECONDS,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, so that nothing of a build stays in the source tree."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    run([sys.executable, "-c", BUILD, folder / "dist"], folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with the requirements of this one, not the project."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv/bin/python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps"]
    run([*install, "--quiet", "--python", python, wheel], folder)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # A path in a .pth file is searched, but .pth files in it, the editable install's, are not read.
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    there = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert there - held == set()
    assert held - there == set()
    assert any(name.endswith(".safetensors") for name in held)
    assert any(name.endswith(".toml") for name in held)


def test_the_command_runs_without_the_source_tree(environment: Path) -> None:
    text = run([environment / "venv/bin/recur", "--help"], environment)

    assert "worker" in text
    where = run([environment / "venv/bin/python", "-c", WHERE], environment).splitlines()
    assert all(Path(file).is_relative_to(environment) for file in where), where


def test_a_transaction_is_scored_without_the_source_tree(environment: Path) -> None:
    example = shutil.copy(ROOT / "examples/score_without_kafka.py", environment)

    lines = run([environment / "venv/bin/python", example], environment).splitlines()

    assert lines[-1].endswith("alert")
