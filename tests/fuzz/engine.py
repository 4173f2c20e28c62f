"""Where inputs come from: atheris, which follows the coverage, or mutations of what was new."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from random import Random
from typing import NoReturn

from tests.fuzz.guard import CORPUS, Guard
from tests.fuzz.mutation import LONGEST_BYTES, PARENT_MAX_BYTES, mutate_bytes
from tests.fuzz.targets import Target

POOL_MAX = 2000
"""Inputs that others are made from."""

SEED_SHARE = 0.3
"""So many are made from the seeds, whatever has been found since."""


def run_mutations(target: Target, guard: Guard, seed: int, corpus: list[bytes]) -> None:
    """Make inputs from the seeds and from those with a new outcome; the same for the same seed."""
    random = Random(_seed_of(target.name, seed))
    pool = [*target.seeds, *corpus]
    for data in pool:
        guard.run(data)
    while not guard.is_over:
        parents = target.seeds if random.random() < SEED_SHARE else pool
        data = random.choice(parents)
        for _ in range(1 + (random.random() < 0.2)):
            data = target.mutate(data, random)[:LONGEST_BYTES]
        if guard.run(data) and len(pool) < POOL_MAX and len(data) <= PARENT_MAX_BYTES:
            pool.append(data)


def run_atheris(
    target: Target, guard: Guard, seed: int, corpus: list[bytes], folder: Path
) -> NoReturn:
    """Have libFuzzer choose inputs by coverage; half of them it makes itself.

    Args:
        folder: an empty one, for the inputs to begin with; removed at the end.
    """
    import atheris

    for number, data in enumerate([*target.seeds, *corpus]):
        (folder / str(number)).write_bytes(data)

    def mutate(data: bytes, size_max: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            return bytes(atheris.Mutate(data, max(len(data), 64)))
        if len(data) > PARENT_MAX_BYTES:
            return mutate_bytes(data, random)
        return target.mutate(data, random)[:size_max]

    def run(data: bytes) -> None:
        guard.run(data)
        if guard.is_over:
            shutil.rmtree(folder)
            guard.end()

    kept = CORPUS / target.name  # what ends the process itself
    kept.mkdir(parents=True, exist_ok=True)
    options = [
        f"-seed={seed}", f"-max_len={LONGEST_BYTES}", f"-artifact_prefix={kept}/",
        "-rss_limit_mb=0", "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup([target.name, *options, str(folder)], run, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("libFuzzer ended by itself")


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
