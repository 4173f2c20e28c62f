"""Fuzz the decoders: ``python -m tests.fuzz --target transaction --inputs 1000000``.

If atheris is installed, the coverage of our own modules guides the inputs. Otherwise the outcomes
of earlier inputs guide them. Each target runs in its own process with bounded memory. The fuzzer
keeps an input that finds something in tests/fuzz/corpus; its exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

NAMES = ("transaction", "label", "state", "watermark", "profile", "checkpoint")
ENGINES = ("atheris", "mutations")

COMPARE_ARRAYS = ("state", "profile")
"""Targets without atheris, because it keeps compared arrays: 6 GiB after a million inputs (3.0)."""


def main() -> int:
    """Parse the command line and fuzz; return the exit code."""
    has_atheris = importlib.util.find_spec("atheris") is not None
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=("all", *NAMES), default="all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target")
    parser.add_argument("--seed", type=int, default=1, help="the same one gives the same inputs")
    parser.add_argument("--engine", choices=ENGINES, help="default: the better one of those there")
    options = parser.parse_args()
    if options.target != "all":
        guided = has_atheris and options.target not in COMPARE_ARRAYS
        engine = options.engine or ENGINES[not guided]
        fuzz(options.target, options.inputs, options.seed, engine)
    arguments = [f"--inputs={options.inputs}", f"--seed={options.seed}"]
    if options.engine:
        arguments.append(f"--engine={options.engine}")
    command = [sys.executable, "-m", "tests.fuzz", *arguments, "--target"]
    return int(any([subprocess.run([*command, name]).returncode for name in NAMES]))


def fuzz(name: str, inputs: int, seed: int, engine: str) -> NoReturn:
    """Fuzz one target in this process and exit with 0, or 1 if there are findings."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["model", "pipeline"]):
            from tests.fuzz import targets
    else:
        from tests.fuzz import targets
    import torch

    from tests.fuzz.engine import run_atheris, run_mutations
    from tests.fuzz.guard import CORPUS, Guard, corpus

    torch.set_num_threads(1)  # threads would slow a network this small
    target = targets.TARGETS[name]
    for data in target.seeds:
        target.run(data)  # lazy imports and caches must not count for an input
    guard = Guard(target, inputs, found=CORPUS, out=sys.stdout)
    known = corpus(target)
    if engine == "atheris":
        folder = Path(tempfile.mkdtemp(prefix="recur-fuzz-"))
        run_atheris(target, guard, seed, known, folder)
    run_mutations(target, guard, seed, known)
    guard.end()


if __name__ == "__main__":
    sys.exit(main())
