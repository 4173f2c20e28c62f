"""Sources of inputs: atheris, guided by coverage, or mutations of inputs with new outcomes."""

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
"""Largest number of inputs to mutate."""

SEED_SHARE = 0.3
"""Share of inputs that are always made from the seeds."""


def run_mutations(target: Target, guard: Guard, seed: int, corpus: list[bytes]) -> None:
    """Mutate the seeds and inputs with new outcomes; the same seed gives the same inputs."""
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
    """Let libFuzzer choose inputs by coverage; its own mutator makes half of them.

    Args:
        folder: an empty folder for the first inputs; removed at the end.
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

    kept = CORPUS / target.name  # libFuzzer keeps inputs that end the process
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
