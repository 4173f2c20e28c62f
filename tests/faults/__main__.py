"""``make faults``: run real faults on a real broker, Redis and workers, and print a table.

Each fault disturbs a system of its own under load. Then the run counts every score and computes
every state again from the log. It compares both with the transactions that were sent.

    python -m tests.faults [--list] [--only NAME ...] [--scale X] [--seed N] [--transactional]
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.progress import Bar
from tests.faults.fault import FRAME_SECONDS, Fault, Row, Shared, run_fault
from tests.faults.registry import FAULTS

PLAIN_WIDTH = 130
"""Characters of a line if the output is not a terminal."""

PLAIN_SHOW_SECONDS = 15.0

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console = Console(highlight=False, soft_wrap=True, width=PLAIN_WIDTH)

HEADINGS = (
    "fault",
    "transactions",
    "lost",
    "twice",
    "conflicting",
    "duplicates",
    "ready again",
    "lag gone",
    "largest |Δh|",
    "",
)


def cells(row: Row) -> list[str]:
    """Format a row of the table."""
    verdict = "[red]violated[/]" if row.complaints else "[yellow]late[/]" if row.late else "held"
    times = ["-" if x is None else f"{x:.1f} s" for x in (row.ready, row.lag_gone)]
    found = row.invariants
    if found is None:
        return [row.fault.name, "-", "-", "-", "-", "-", *times, "-", verdict]
    return [
        row.fault.name,
        f"{found.transactions:,}",
        f"{found.lost:,}",
        f"{found.twice:,}",
        f"{found.conflicting:,}",
        f"{found.duplicates:,}",
        *times,
        f"{found.verification.largest_hidden:.1g}",
        verdict,
    ]


def table(rows: list[Row]) -> Table:
    """Make the table of all rows."""
    drawn = Table(title="Recur under faults")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="left" if heading in ("fault", "") else "right")
    for row in rows:
        drawn.add_row(*cells(row))
    return drawn


def remarks(row: Row) -> Iterator[str]:
    """List remarks that are not in the table, a line each."""
    found = row.invariants
    if found is not None:
        checked = found.verification
        yield (
            f"{checked.right:,} of {checked.accounts:,} accounts agree with the log, largest"
            f" |Δscore| {checked.largest_score:.1g}"
        )
    yield from row.notes
    if row.late:
        yield row.late
    yield from (f"VIOLATED: {complaint}" for complaint in row.complaints)


def show(row: Row, seconds: float) -> None:
    """Print a row when its fault is done."""
    named = zip(HEADINGS[1:-1], cells(row)[1:-1], strict=True)
    values = ", ".join(f"{name} [bold]{value}[/]" for name, value in named)
    console.print(f"{row.fault.name}: {cells(row)[-1]} after {seconds:.0f} s; {values}")
    for remark in remarks(row):
        console.print(f"  {remark}", style="dim", markup=False)


async def run_all(
    chosen: list[Fault], shared: Shared, scale: float, seed: int, overrides: dict[str, Any]
) -> list[Row]:
    """Run the faults one after the other."""
    rows = []
    for fault in chosen:
        started = time.monotonic()
        console.print(f"{fault.name}: {fault.what} ...", style="dim", markup=False)
        with Bar(console) as bar:
            row = await run_fault(
                fault,
                shared,
                bar,
                show_seconds=FRAME_SECONDS if console.is_terminal else PLAIN_SHOW_SECONDS,
                scale=scale,
                seed=seed,
                overrides=overrides,
            )
        show(row, time.monotonic() - started)
        rows.append(row)
    return rows


@click.command()
@click.option("--list", "list_them", is_flag=True, help="list the faults and exit")
@click.option("--only", multiple=True, metavar="NAME", help="run only this fault; may be repeated")
@click.option("--scale", default=1.0, help="length of each fault; 0.1: a tenth of the full length")
@click.option("--seed", default=0, help="seed of all random choices")
@click.option(
    "--timed", is_flag=True, help="count a recovery that takes longer than promised as a violation"
)
@click.option(
    "--transactional",
    is_flag=True,
    help="run workers with RECUR_PROCESSING_GUARANTEE=exactly_once",
)
def main(
    list_them: bool,
    only: tuple[str, ...],
    scale: float,
    seed: int,
    timed: bool,
    transactional: bool,
) -> None:
    """Run faults on a real system and check its guarantees."""
    faults = {fault.name: fault for fault in FAULTS}
    if list_them:
        for fault in FAULTS:
            console.print(f"{fault.name:17} {fault.what}", markup=False)
        return
    unknown = set(only) - faults.keys()
    if unknown:
        raise click.UsageError(f"there is no fault {', '.join(sorted(unknown))}; see --list")
    overrides: dict[str, Any] = {}
    if transactional:
        overrides["processing_guarantee"] = "exactly_once"
    logging.getLogger().setLevel(logging.CRITICAL)  # Kafka clients log each unreachable broker
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load average"
        f" {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    )
    chosen = [faults[name] for name in faults if not only or name in only]
    with Shared() as shared:
        rows = asyncio.run(run_all(chosen, shared, scale, seed, overrides))
    console.print(table(rows))
    late = [row for row in rows if row.late]
    if late and not timed:
        console.print(
            "late rows are not violations without --timed: other programs may have slowed the run"
        )
    if any(row.complaints for row in rows) or (timed and late):
        sys.exit(1)


if __name__ == "__main__":
    main()
