"""Two fixed loops that state how fast this machine is.

A worker on a cold cache is as slow as the memory, so a CPU loop alone does not compare machines.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

CPU_STEPS = 10_000_000
MEMORY_NUMBERS = 1 << 25
"""Length of the table that the memory loop reads at random: 256 MiB, which fit no cache."""
MEMORY_READS = 20_000_000


class MachineSpeed(NamedTuple):
    """Seconds of the two loops; smaller is faster."""

    cpu_seconds: float
    memory_seconds: float

    def __str__(self) -> str:
        return f"CPU loop {self.cpu_seconds:.2f} s, memory loop {self.memory_seconds:.2f} s"


def measure_machine() -> MachineSpeed:
    """Run both loops; they take a few seconds."""
    return MachineSpeed(_cpu_seconds(), _memory_seconds())


def _cpu_seconds() -> float:
    """Time a loop of Python bytecode on small integers."""
    began = time.perf_counter()
    total = 0
    for step in range(CPU_STEPS):
        total = (total + step) & 0xFFFF
    return time.perf_counter() - began


def _memory_seconds() -> float:
    """Time random reads of a table of 256 MiB."""
    table = np.ones(MEMORY_NUMBERS, np.int64)
    places = np.random.default_rng(0).integers(0, MEMORY_NUMBERS, MEMORY_READS)
    began = time.perf_counter()
    table.take(places).sum()
    return time.perf_counter() - began
