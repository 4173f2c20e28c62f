"""Many concurrent runs, with one process for each processor."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

from tests.simulation.run import simulate, simulating

SEEDS_AT_ONCE = 100
"""Number of seeds that a process gets at once."""


def failures(seeds: range) -> list[tuple[int, str]]:
    """Run seeds until one fails; return that seed with its violation, if any."""
    with simulating():
        for seed in seeds:
            violation = simulate(seed).violation
            if violation is not None:
                return [(seed, str(violation))]
    return []


def soak(
    seeds: range, processes: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> tuple[int, str] | None:
    """Run seeds in order until one fails.

    Args:
        processes: number of processes; by default the number of processors.
        progress: called with the number of completed runs.

    Returns:
        the first failing seed with its violation, or None.
    """
    processes = processes or processors()
    parts = (seeds[i : i + SEEDS_AT_ONCE] for i in range(0, len(seeds), SEEDS_AT_ONCE))
    done = 0
    # A forked process would copy the locks of this process's threads without the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        under_way = deque((part, pool.submit(failures, part)) for part in islice(parts, processes))
        while under_way:
            under_way += ((part, pool.submit(failures, part)) for part in islice(parts, 1))
            part, result = under_way.popleft()
            found = result.result()
            if found:
                pool.shutdown(cancel_futures=True)
                return found[0]
            done += len(part)
            progress(done)
    return None


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
