"""Command line of the simulation: many runs, or one run with every step."""

from __future__ import annotations

import argparse
import sys
from time import monotonic

from tests.simulation.bugs import BUGS, Bug
from tests.simulation.run import simulate, simulating
from tests.simulation.soak import processors, soak

RIGHT = Bug("none", 0, 0)


def main() -> int:
    """Parse the command line and run; return exit code 1 if a run fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="Runs the worker on a simulated broker and store that fail as a seed says.",
    )
    parser.add_argument("--seeds", type=int, default=10_000, help="how many runs")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=processors(), help="how many run at once")
    parser.add_argument("--seed", type=int, help="one run, with every step of it")
    parser.add_argument(
        "--bug",
        default=RIGHT.name,
        help="one of those planted by hand, by name; without --seed: count the runs that find it",
    )
    options = parser.parse_args()
    bugs = {bug.name: bug for bug in [RIGHT, *BUGS]}
    if options.bug not in bugs:
        parser.error(f"no such bug; there are: {'; '.join(bugs)}")
    bug = bugs[options.bug]
    if options.seed is not None:
        return replay(options.seed, bug)
    seeds = range(options.start, options.start + options.seeds)
    return many(seeds, options.processes) if bug is RIGHT else count(seeds, bug)


def replay(seed: int, bug: Bug) -> int:
    """Run one seed and print each step: virtual seconds, effects on services so far, event."""
    with simulating(), bug.planted():
        result = simulate(seed, bug.parts, trace=True)
    print("\n".join(result.trace))
    if result.violation is None:
        print(f"seed {seed}: nothing is wrong")
        return 0
    return tell(seed, str(result.violation), "" if bug is RIGHT else f' --bug "{bug.name}"')


def count(seeds: range, bug: Bug) -> int:
    """Run all seeds with a planted bug, and print how many of the runs find it."""
    with simulating(), bug.planted():
        finding = [seed for seed in seeds if simulate(seed, bug.parts).violation is not None]
    first = f", the first with seed {finding[0]}" if finding else ""
    print(f"{len(finding)} of {len(seeds):,} runs find it{first}")
    return 0


def many(seeds: range, processes: int) -> int:
    """Run all seeds until one fails."""
    began = monotonic()

    def progress(done: int) -> None:
        seconds = monotonic() - began
        if sys.stderr.isatty():
            text = f"{done:,} of {len(seeds):,} runs, {done / seconds:,.0f}/s"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    found = soak(seeds, processes, progress)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if found is not None:
        return tell(*found)
    print(f"{len(seeds):,} runs in {monotonic() - began:.0f} s: nothing is wrong")
    return 0


def tell(seed: int, violation: str, more: str = "") -> int:
    """Print the violation and the command that replays it."""
    print(f"seed {seed}: {violation}")
    print(f"replay it:  python -m tests.simulation --seed {seed}{more}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
