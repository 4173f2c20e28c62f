"""Many runs, side by side in as many processes as there are processors."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

from tests.simulation.run import simulate, simulating

SEEDS_AT_ONCE = 100
"""Given to a process together."""


def failures(seeds: range) -> list[tuple[int, str]]:
    """Seeds at which something is wrong, with what; the runs end at the first one."""
    with simulating():
        for seed in seeds:
            violation = simulate(seed).violation
            if violation is not None:
                return [(seed, str(violation))]
    return []


def soak(
    seeds: range, processes: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> tuple[int, str] | None:
    """Run seeds in order until one finds something wrong.

    Args:
        processes: how many at once; as many as there are processors if none is given.
        progress: called with how many runs are done.

    Returns:
        the first seed at which something is wrong, with what.
    """
    processes = processes or processors()
    parts = (seeds[i : i + SEEDS_AT_ONCE] for i in range(0, len(seeds), SEEDS_AT_ONCE))
    done = 0
    # A forked process would have the locks of this one's threads, and not the threads.
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
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
