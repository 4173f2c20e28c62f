"""The command line: ``recur COMMAND``. Each command is thin; its work is elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from pipeline import logs
from pipeline.cli.state import state
from pipeline.errors import RecurError, SettingsError
from pipeline.settings import CONFIG_VARIABLE, describe, load_settings
from pipeline.worker.shutdown import leave_at_signals


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"TOML file of settings (also {CONFIG_VARIABLE}).",
)
@click.version_option(package_name="recur", prog_name="recur")
def recur(config: Path | None) -> None:
    """Score card transactions as they happen, with a recurrent state for each account."""
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)


@recur.command()
def worker() -> None:
    """Run a worker of the consumer group until SIGTERM or Ctrl-C."""
    leave_at_signals()  # the imports below take a while
    from pipeline.worker.app import run_worker

    sys.exit(run_worker(load_settings()))


@recur.command()
def settings() -> None:
    """Print every setting with its value, default and meaning."""
    rows = list(describe(load_settings()))
    width = max(len(name) for name, *_ in rows) + len("RECUR_")
    for name, value, default, description in rows:
        changed = "" if value == default else f"  (default {default})"
        click.echo(f"{'RECUR_' + name.upper():{width}}  {value}{changed}")
        click.echo(f"{'':{width}}  {click.style(description, dim=True)}")


@recur.command()
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet or CSV file of labelled transactions; without it they are simulated.",
)
@click.option("--columns", metavar="MAPPING", help="Column mapping: a TOML file, or `handbook`.")
@click.option("--skip-unusable", is_flag=True, help="Leave out rows that are no transactions.")
@click.option("--train-until", metavar="DATE", help="No label from then on is learned from.")
@click.option("--test-from", metavar="DATE", help="The measures are taken from then on.")
@click.option(
    "--label-delay-days",
    type=float,
    default=7.0,
    show_default=True,
    help="From a transaction to the day when its label is there.",
)
@click.option("--customers", type=int, default=5_000, show_default=True, help="Simulated.")
@click.option("--terminals", type=int, default=10_000, show_default=True, help="Simulated.")
@click.option("--days", type=int, default=183, show_default=True, help="Simulated.")
@click.option(
    "--world",
    type=click.Choice(["wide", "handbook"]),
    default="wide",
    show_default=True,
    help="Simulated: many kinds of accounts and fraud, or the Handbook's alone.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of data and weights.")
@click.option("--hidden-size", type=int, default=128, show_default=True)
@click.option("--layers", type=int, default=1, show_default=True, help="GRU layers.")
@click.option("--epochs", type=int, help="By default by the size of the data.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--no-probe", is_flag=True, help="Do not probe the checkpoint at the end.")
def train(
    output: Path,
    data: Path | None,
    columns: str | None,
    skip_unusable: bool,
    no_probe: bool,
    **options: Any,
) -> None:
    """Train a network on your transactions, or simulated ones; write its checkpoint to OUTPUT.

    Interrupted, it goes on where it stopped when it is started again in the same way. At the end
    it probes the checkpoint (see `recur probe`) and ends with code 1 on a violation.
    """
    from model.checkpoint import CheckpointError
    from model.probe.sweeps import short_probe
    from model.simulator.handbook import SimulatorError
    from model.training.train import TrainingError, TrainingSettings
    from model.training.train import train as train_network
    from pipeline.files.column_mapping import load_mapping
    from pipeline.files.training_data import FileData
    from pipeline.progress import TrainingProgress

    if (data is None) != (columns is None):
        raise SettingsError(
            "recur train takes --data and --columns together; `recur replay --example-columns`"
            " prints a column mapping to start from"
        )
    source = None
    if data is not None and columns is not None:
        source = FileData(data, load_mapping(columns), skip_unusable)
    try:
        with TrainingProgress() as progress:
            checkpoint = train_network(TrainingSettings(**options), output, progress.report, source)
        probed = None if no_probe else short_probe(checkpoint)
        if probed is not None:
            metrics = checkpoint.header.metrics | probed.metrics()
            checkpoint = checkpoint.with_header(metrics=metrics)
            checkpoint.save(output)
    except (CheckpointError, SimulatorError, TrainingError) as error:
        raise RecurError(str(error)) from error
    click.echo(f"{output}: model {checkpoint.digest}, on days held out:")
    for name, value in checkpoint.header.metrics.items():
        click.echo(f"  {name:32} {value:.4g}")
    if probed is not None:
        for line in probed.lines():
            click.echo(line)
        if probed.failed:
            sys.exit(1)


@recur.command()
@click.argument("account_id", metavar="ID")
def account(account_id: str) -> None:
    """Print what the live state in Redis says of the account ID.

    Whether it is compromised now, by all of its history; its counts and amounts; where the
    state lies and how old it is. Settings are the workers'.
    """
    import asyncio

    from pipeline.admin.inspect_account import account_lines

    for line in asyncio.run(account_lines(load_settings(), account_id)):
        click.echo(line)


@recur.command()
@click.option("--account", metavar="ID", help="Only this account.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only so many accounts, chosen by the hashes of their ids: the same ones each time.",
)
@click.option("--from", "from_time", metavar="TIME", help="Only scores of records from then on,")
@click.option("--to", "to_time", metavar="TIME", help="and before then (the record's CreateTime).")
@click.option(
    "--tolerance-hidden",
    type=click.FloatRange(min=0),
    default=2e-3,
    show_default=True,
    help="Of a hidden; see docs/verify.md for what was measured.",
)
@click.option(
    "--tolerance-score",
    type=click.FloatRange(min=0),
    default=2e-4,
    show_default=True,
    help="Of a score.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what was found to this file, too.",
)
def verify(
    account: str | None,
    sample: int | None,
    from_time: str | None,
    to_time: str | None,
    json_file: Path | None,
    **tolerances: float,
) -> None:
    """Verify that states in Redis and published scores are what the log says.

    Computes both from the log again, up to the watermarks, and compares; workers may run
    meanwhile, and nothing is written. Ends with code 1 where a state or score differs past its
    tolerance, a score is missing or two of one transaction contradict each other, or a state has
    no log. Accounts whose history began before the log does are listed as unverifiable. A TIME is
    2024-05-31T18:00:00Z or milliseconds since 1970. Settings are the workers'.
    """
    from pipeline.audit.report import run_verify
    from pipeline.audit.verifier import VerifyOptions
    from pipeline.timestamps import epoch_ms_of

    if account is not None and sample is not None:
        raise SettingsError("recur verify takes --account or --sample, not both")
    options = VerifyOptions(
        account=account,
        sample=sample,
        from_ms=None if from_time is None else epoch_ms_of(from_time, "--from"),
        to_ms=None if to_time is None else epoch_ms_of(to_time, "--to"),
        **tolerances,
    )
    sys.exit(run_verify(options, load_settings(), json_file))


@recur.command()
@click.argument("checkpoint", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--review", metavar="GOAL", help="What the review threshold shall do.")
@click.option("--decline", metavar="GOAL", help="What the decline threshold shall do.")
@click.option("--alerts-per-day", metavar="N", help="Short for --review alerts-per-day=N.")
@click.option("--false-positive-rate", metavar="X", help="... --review false-positive-rate=X.")
@click.option("--precision", metavar="P", help="... --review precision=P.")
@click.option(
    "--cost-missed",
    metavar="COST",
    help="Of a missed fraud: an amount, or per cent of the fraud's amount (the default, 100%).",
)
@click.option("--cost-review", metavar="AMOUNT", help="Of one review, which tells the truth.")
@click.option(
    "--cost-decline",
    metavar="COST",
    help="Of declining a good payment: an amount, or per cent of the payment's.",
)
@click.option("--dry-run", is_flag=True, help="Print what is expected, and write nothing.")
def thresholds(checkpoint: Path, dry_run: bool, **wishes: str | None) -> None:
    """Choose CHECKPOINT's review and decline thresholds by what they shall do.

    A GOAL is one of alerts-per-day=N (at most; declined ones count), false-positive-rate=X
    (at most, of the legitimate transactions), precision=P (at least, of the alerts) or
    threshold=T; shares as 0.9 or 90%. With costs instead, both thresholds are those whose
    expected cost a day is the lowest. A threshold of which nothing is said stays, but for one
    thing: decline is never under review. Without any wish, what is expected now is printed.

    \b
      recur thresholds model.safetensors --alerts-per-day 100
      recur thresholds model.safetensors --review false-positive-rate=0.2% \\
                                         --decline precision=0.9
      recur thresholds model.safetensors --cost-review 4 --cost-decline 30

    The weights stay, and the digest with them: running workers whose RECUR_CHECKPOINT is this
    file decide by the new thresholds some seconds later.
    """
    from model.checkpoint import Checkpoint, CheckpointError
    from model.thresholds import OperatingPoints, ThresholdsError, Wishes, report

    try:
        loaded = Checkpoint.load(checkpoint)
        points, before = OperatingPoints(loaded.header), loaded.header.thresholds
        wanted = Wishes.parse(wishes)
        after = wanted.choose(points, before)
    except (CheckpointError, ThresholdsError) as error:
        raise RecurError(str(error)) from error
    for line in report(points, before, after, wanted.costs):
        click.echo(line)
    if after is None or dry_run:
        return
    try:
        loaded.with_header(thresholds=after).save(checkpoint)
    except CheckpointError as error:
        raise RecurError(str(error)) from error
    click.echo(f"  Written to {checkpoint} (model {loaded.digest}).")


@recur.command()
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--columns", metavar="MAPPING", help="Column mapping: a TOML file, or `handbook`.")
@click.option(
    "--protocol",
    type=click.Choice(["split", "handbook"]),
    default="split",
    show_default=True,
    help="One split by time, or the Fraud Detection Handbook's four weekly folds.",
)
@click.option(
    "--train-until",
    metavar="DATE",
    help="split: no label from then on is learned from; default: half of the days are.",
)
@click.option(
    "--test-from", metavar="DATE", help="split: default: when the training's labels have arrived."
)
@click.option(
    "--test-until", metavar="DATE", help="split: the test ends before it; default: the log's end."
)
@click.option(
    "--fold-start",
    metavar="DATE",
    default="2018-08-15",
    show_default=True,
    help="handbook: first day of the latest training week.",
)
@click.option("--label-delay-days", type=int, default=7, show_default=True)
@click.option(
    "--networks", metavar="A,B,...", help="Of those that the table names; default: all of them."
)
@click.option("--seeds", type=int, default=1, show_default=True, help="Trainings of each network.")
@click.option("--epochs", type=int, help="Of each training.")
@click.option("--hidden-size", type=int, help="Of each recurrent network.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compared too; the model card is about this one.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("evaluation"),
    show_default=True,
    help="Folder of results, plots and model card; what was trained stays there and is not "
    "trained again.",
)
@click.option("--no-plots", is_flag=True, help="Do without matplotlib.")
@click.option("--no-robustness", is_flag=True, help="Leave out what faults of states cost.")
@click.option("--customers", type=int, help="Simulated, without FILE.")
@click.option("--terminals", type=int, help="Simulated, without FILE.")
@click.option("--days", type=int, help="Simulated, without FILE.")
@click.option(
    "--world",
    type=click.Choice(["handbook", "wide"]),
    default="handbook",
    show_default=True,
    help="Simulated, without FILE: the Handbook's accounts and frauds, or many more kinds.",
)
def evaluate(**options: Any) -> None:
    """Compare networks, and LightGBM, on the transactions in FILE or on simulated ones.

    Prints a table and writes results.json, model_card.md, pr.png and calibration.png.
    """
    from pipeline.cli.evaluate import evaluate_options, run_evaluate

    run_evaluate(evaluate_options(**options))


@recur.command("probe")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet or CSV file of labelled transactions: its accounts are probed, too.",
)
@click.option("--columns", metavar="MAPPING", help="Column mapping: a TOML file, or `handbook`.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what was found to this file, too.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG file of scores by sweep and of exposure; needs matplotlib.",
)
@click.option("--short", is_flag=True, help="The short form, as at the end of `recur train`.")
def probe_command(**options: Any) -> None:
    """Test how CHECKPOINT behaves: sweeps, large payments, and what a thief can take.

    With the history fixed, more money and more known frauds at the merchant must not lower the
    score. Prints each place where it falls, where an input leaves its range, and the exposure:
    the most that a thief who knows the model takes under the review threshold. Ends with code 1
    on a violation.
    """
    from pipeline.cli.probe import ProbeOptions, run_probe

    sys.exit(run_probe(ProbeOptions(**options)))


@recur.command()
@click.option("--transactions", type=int, default=200_000, show_default=True, help="Of the burst.")
@click.option(
    "--rate", type=float, default=500, show_default=True, help="Of the live part, a second."
)
@click.option(
    "--seconds", type=float, default=30, show_default=True, help="Length of the live part."
)
@click.option("--workers", type=int, default=2, show_default=True, help="Worker processes.")
@click.option(
    "--world",
    type=click.Choice(["wide", "handbook"]),
    default="wide",
    show_default=True,
    help="Many kinds of accounts and fraud, or the Handbook's alone.",
)
@click.option("--keep-running", is_flag=True, help="Go on with the live part until Ctrl-C.")
def demo(**options: Any) -> None:
    """Watch it work: Kafka, Redis, workers and simulated payments with fraud, for a minute."""
    from pipeline.demo.run import DemoOptions, run_demo

    sys.exit(run_demo(DemoOptions(**options)))


@recur.command()
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--columns", metavar="MAPPING", help="Column mapping: a TOML file, or `handbook`.")
@click.option("--example-columns", is_flag=True, help="Print a column mapping to start from.")
@click.option("--speed", type=float, help="The recorded pace times this.")
@click.option("--rate", type=float, help="Transactions a second; default: as fast as it goes.")
@click.option("--warm", is_flag=True, help="Build states, raise no alerts.")
@click.option("--limit", type=int, help="Only the first so many transactions.")
@click.option("--offset-days", type=float, default=0.0, help="Added to every time, days.")
@click.option("--skip-unusable", is_flag=True, help="Leave out rows that are no transactions.")
@click.option("--allow-unsorted", is_flag=True, help="Send rows that are not in order of time.")
@click.option("--report", is_flag=True, help="Wait for the scores and tell what came out.")
@click.option(
    "--report-skip-days", type=int, default=0, help="Days that the report's measures leave out."
)
def replay(file: Path | None, columns: str | None, example_columns: bool, **options: Any) -> None:
    """Feed the transactions in FILE (parquet or CSV) to the workers."""
    from pipeline.files.column_mapping import example_mapping
    from pipeline.replay.replay import ReplayOptions, run_replay

    if example_columns:
        click.echo(example_mapping())
        return
    if file is None or columns is None:
        raise SettingsError(
            "recur replay needs FILE and --columns; `recur replay --example-columns` prints a "
            "column mapping to start from"
        )
    sys.exit(run_replay(ReplayOptions(file=file, columns=columns, **options), load_settings()))


@recur.command()
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option(
    "--columns",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="MAPPING",
    help="TOML file that names FILE's columns ([columns], [prefixes], [time]).",
)
@click.option(
    "--from-transactions",
    metavar="MAPPING",
    help="FILE holds transactions; their column mapping: a TOML file, or `handbook`.",
)
@click.option(
    "--delay-days",
    type=float,
    default=7.0,
    show_default=True,
    help="With --from-transactions: labels come so long after.",
)
@click.option("--legitimate", is_flag=True, help="With --from-transactions: not frauds alone.")
@click.option("--offset-days", type=float, default=0.0, help="Added to every time, days.")
@click.option("--transaction-id", help="A single label: of this transaction,")
@click.option("--account-id", help="of this account")
@click.option("--merchant-id", help="at this merchant")
@click.option("--label", type=click.Choice(["fraud", "legitimate"]), help="is this")
@click.option("--timestamp", help="and was made then (ISO 8601 with zone, or milliseconds).")
@click.option("--labelled-at", help="When that became known; default: now.")
def label(file: Path | None, **options: Any) -> None:
    """Send labels, the truth about transactions: those in FILE (parquet or CSV), or a single one.

    FILE has columns transaction_id, account_id, merchant_id, label (fraud or legitimate), timestamp
    (of the transaction) and labelled_at.
    """
    from pipeline.replay.labels import LabelOptions, run_label

    sys.exit(run_label(LabelOptions(file=file, **options), load_settings()))


recur.add_command(state)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point; a known error ends with one line and no traceback."""
    try:
        recur(args=arguments, prog_name="recur")
    except SettingsError as error:
        _fail(error, 2)
    except RecurError as error:
        _fail(error, 1)


def _fail(error: RecurError, code: int) -> None:
    logs.summarize_dropped()  # before the last line, which says what to do
    for line in str(error).splitlines():
        click.echo(f"recur: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
