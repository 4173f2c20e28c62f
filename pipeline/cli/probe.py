"""The command `recur probe`: test a checkpoint's behaviour, print and write the findings."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from model.checkpoint import Checkpoint, CheckpointError
from model.data.dataset import Dataset, DatasetError
from model.evaluation.lightgbm_reference import MissingRequirementError
from model.evaluation.plots import require_matplotlib
from model.probe.exposure import TARGET_RATE, TARGET_TIMES_USUAL, AccountLoss, Exposure, Point
from model.probe.plots import plot_probe
from model.probe.sweeps import FULL, SHORT, LargePayments, ProbeResult, describe_fall, probe
from model.training.settings import Report, Reporter
from pipeline.cli.options import require_both
from pipeline.errors import RecurError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.training_data import FileData
from pipeline.progress import TrainingProgress
from pipeline.tables import print_table, widen

FALLS_SHOWN = 20
"""Most falls of the score that are printed."""

ROWS_SHOWN = 40
"""Most histories in the table of large payments."""

TABLE_COLUMNS = 140
"""Least width of the tables, characters."""

_READ_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Options of `recur probe`; see its help."""

    checkpoint: Path
    data: Path | None = None
    columns: str | None = None
    json_file: Path | None = None
    plot: Path | None = None
    short: bool = False


def run_probe(options: ProbeOptions, console: Console | None = None) -> int:
    """Probe; print tables; write the JSON file and the plot.

    Returns:
        1 if the checkpoint violates a rule, else 0.

    Raises:
        RecurError: the options, the checkpoint or the data must be corrected.
    """
    console = console or Console()
    require_both("recur probe", options.data, options.columns)
    try:
        checkpoint = Checkpoint.load(options.checkpoint)
        with TrainingProgress(command="probe") as progress:
            result = _probe(options, checkpoint, progress.report)
    except (CheckpointError, DatasetError) as error:
        raise RecurError(str(error)) from error
    print_result(result, console)
    _write(options, result, console)
    return 1 if result.failed else 0


def _probe(options: ProbeOptions, checkpoint: Checkpoint, report: Reporter) -> ProbeResult:
    settings = SHORT if options.short else FULL

    def within(begin: float, done: float, note: str) -> None:
        report(Report(note, begin + (1 - begin) * done))

    if options.data is None or options.columns is None:
        return probe(checkpoint, settings, None, lambda done, note: within(0.0, done, note))
    source = FileData(options.data, load_mapping(options.columns))
    with tempfile.TemporaryDirectory(prefix="recur-probe-") as folder:

        def show(share: float, note: str) -> None:
            report(Report("reading transactions", _READ_SHARE * share, note))

        log: Dataset = source.write(Path(folder) / "data", show)
        _require_currency(log, checkpoint)
        return probe(checkpoint, settings, log, lambda done, note: within(_READ_SHARE, done, note))


def _require_currency(log: Dataset, checkpoint: Checkpoint) -> None:
    if log.currency != checkpoint.header.currency:
        raise RecurError(
            f"the data are in {log.currency}, the checkpoint was trained on "
            f"{checkpoint.header.currency}: probe it with data of that currency"
        )


def _write(options: ProbeOptions, result: ProbeResult, console: Console) -> None:
    try:
        if options.json_file is not None:
            text = msgspec.json.format(msgspec.json.encode(result), indent=2)
            options.json_file.write_bytes(text + b"\n")
            console.print(f"Written to {options.json_file}.", soft_wrap=True)
        if options.plot is not None:
            try:
                require_matplotlib()
            except MissingRequirementError:
                console.print(
                    "The plot is left out, because matplotlib cannot be loaded: "
                    "pip install 'recur\\[evaluate]'",
                    soft_wrap=True,
                )
                return
            plot_probe(result, options.plot)
            console.print(f"Plot written to {options.plot}.", soft_wrap=True)
    except OSError as error:
        raise RecurError(f"cannot write {error.filename}: {error.strerror or error}") from error


def print_result(result: ProbeResult, console: Console) -> None:
    """Print violations, inputs out of range, large payments and the exposure."""
    widen(console, TABLE_COLUMNS)
    console.print(
        f"model {result.model}, {result.form} probe: {result.histories} histories, "
        f"{result.scores:,} scores in sweeps, review threshold {result.review:.4g}, "
        f"amounts in {result.currency} x {result.scale:g}",
        highlight=False,
    )
    _print_violations(result, console)
    _print_ranges(result, console)
    _print_large(result.large, result.review, console)
    _print_exposure(result.exposure, console)
    outcome = (
        f"FAILED: {result.violations:,} violations, {result.large.under_smaller:,} large payments "
        "approved with a score under a smaller one's"
        if result.failed
        else "PASSED: no violation"
    )
    console.print(f"\n[bold]{outcome}[/bold] ({result.seconds:,.0f} s)", highlight=False)


def _print_violations(result: ProbeResult, console: Console) -> None:
    console.print("\n[bold]Where the score falls but must not[/bold]")
    counts = ", ".join(f"{count:,} in {name}" for name, count in result.violations_by_sweep.items())
    console.print(f"violations: {counts} ({result.tolerance})", highlight=False, soft_wrap=True)
    for fall in result.falls[:FALLS_SHOWN]:
        console.print(f"  {describe_fall(fall)}", highlight=False, soft_wrap=True)
    if len(result.falls) > FALLS_SHOWN:
        console.print(f"  ... {result.violations - FALLS_SHOWN:,} more, smaller ones")


def _print_ranges(result: ProbeResult, console: Console) -> None:
    console.print("\n[bold]Where an input leaves its range[/bold]")
    if not result.states_ranges:
        console.print("The checkpoint has no ranges: it extrapolates past what training saw.")
        return
    if not result.out_of_range:
        console.print("nowhere")
        return
    console.print("The input saturates there, which is no violation.")
    rows = [
        [
            left.feature,
            left.sweep,
            f"{left.low:,.5g} to {left.high:,.5g}",
            f"{left.first_value:,.5g}",
            f"{left.histories:,}",
        ]
        for left in result.out_of_range
    ]
    print_table(console, ["feature", "sweep", "range", "left first at", "histories"], rows)


def _print_large(large: LargePayments, review: float, console: Console) -> None:
    console.print("\n[bold]Large payments: over ten times the usual amount[/bold]")
    console.print(
        f"{large.approved:,} of {large.tried:,} are approved, {large.under_a_hundredth:,} of them "
        f"with a score under .01; {large.under_smaller:,} have a score under a smaller payment's "
        "(marked !).",
        highlight=False,
    )
    approved = [
        row
        for row in large.rows
        if any(score is not None and score < review for score in row.score)
    ]
    if not approved:
        return
    console.print(f"Scores, of the {len(approved):,} histories after which one is approved:")
    rows = [
        [
            row.history,
            f"{row.usual:,.2f}",
            *(
                _score(score, review, under)
                for score, under in zip(row.score, row.under_smaller, strict=True)
            ),
        ]
        for row in approved[:ROWS_SHOWN]
    ]
    amounts = [f"{amount:,.0f}" for amount in large.amounts]
    print_table(console, ["history", "usual", *amounts], rows)
    if len(approved) > ROWS_SHOWN:
        console.print(f"... {len(approved) - ROWS_SHOWN:,} more histories")


def _score(score: float | None, review: float, under: bool) -> str:
    if score is None:
        return ""
    text = f"{score:.4f}".removeprefix("0") if score < 1 else "1.000"
    return f"[bold red]{text}{'!' if under else ' '}[/bold red]" if score < review else f"{text} "


def _print_exposure(exposure: Exposure, console: Console) -> None:
    console.print("\n[bold]Exposure: the most that a thief takes under the threshold[/bold]")
    if exposure.review is None:
        console.print("not measured: no account has enough payments without a fraud")
        return
    console.print(
        f"over {exposure.accounts:,} accounts ({exposure.payments:,} legitimate payments, "
        f"{exposure.flagged:.2%} at or over review), {exposure.plans:,} plans tried; as multiples "
        "of what the account usually spends in that time",
        highlight=False,
        soft_wrap=True,
    )
    headings = ["threshold", "false positives", "time", "median", "p99"]
    headings += ["median amount", "p99 amount", "payments", "at a bound", "best plan of most"]
    rows = _point_rows(exposure.review, "review")
    for point in exposure.curve:
        rows += _point_rows(point, f"{point.threshold:.4g}")
    print_table(console, headings, rows)
    console.print("At a bound (largest payment, most payments) the figure is a lower bound.")
    if exposure.target is None:
        console.print("The checkpoint has no rates of false positives: the aim is not measured.")
        return
    console.print(
        f"Aim of at most {TARGET_TIMES_USUAL:g} times in the median at {TARGET_RATE:.1%} false "
        f"positives: {'met' if exposure.target_met else 'not met'}.",
        highlight=False,
    )


def _point_rows(point: Point, name: str) -> list[list[str]]:
    def row(taken: AccountLoss, time: str, first: str) -> list[str]:
        return [
            first,
            f"{point.false_positive_rate:.3%}" if first else "",
            time,
            f"{taken.median:,.4g}",
            f"{taken.p99:,.4g}",
            f"{taken.median_amount:,.0f}",
            f"{taken.p99_amount:,.0f}",
            f"{taken.payments:,.0f}",
            f"{taken.at_bound:.0%}",
            taken.plan,
        ]

    return [row(point.day, "day", name), row(point.week, "week", "")]
