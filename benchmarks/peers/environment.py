"""The environment that the peers run in, made from ``requirements/peers.txt`` when it is missing.

It lies in the main environment, so that it goes with it. The file ``recur.pth`` adds the packages
of the main environment behind its own.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements/peers.txt"
ENVIRONMENT = Path(sys.prefix) / "peers"
PYTHON = ENVIRONMENT / "bin/python"
MADE = ENVIRONMENT / "made-from"
"""Written last; names what the environment was made from."""


def peers_python() -> Path:
    """Make the environment if it is missing or not current, and return its Python.

    Raises:
        subprocess.CalledProcessError: uv cannot make it; uv has said why.
    """
    main_packages = sysconfig.get_path("purelib")
    source = REQUIREMENTS.read_bytes() + f"{sys.version} {main_packages}".encode()
    digest = hashlib.sha256(source).hexdigest()
    if not MADE.exists() or MADE.read_text() != digest:
        _uv("venv", "--clear", "--python", sys.executable, str(ENVIRONMENT))
        _uv(
            *("pip", "install", "--python", str(PYTHON), "--no-deps", "--require-hashes"),
            *("--only-binary", ":all:", "--requirement", str(REQUIREMENTS)),
        )
        packages = subprocess.run(
            [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(packages) / "recur.pth").write_text(main_packages + "\n")
        MADE.write_text(digest)
    return PYTHON


def missing(module: str) -> str | None:
    """Try to import a module there; return the error's last line if it fails."""
    done = subprocess.run(
        [peers_python(), "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else None


def _uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *arguments, "--quiet"], check=True)
