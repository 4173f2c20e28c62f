"""The command line, `recur COMMAND`: each command parses its options and calls another room.

Commands import what they run only when they run: `recur --help` needs neither torch nor Faust.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from pipeline import logs
from pipeline.cli.generate import evaluate_generator, generate, train_generator
from pipeline.cli.keys import keys
from pipeline.cli.options import (
    EXAMPLE_HINT,
    EXISTING_FILE,
    OUTPUT_FILE,
    columns_option,
    data_option,
    dry_run_option,
    file_argument,
    json_option,
    offset_days_option,
    require_both,
    simulation_options,
    skip_unusable_option,
    world_option,
)
from pipeline.cli.state import state
from pipeline.cli.trace import trace
from pipeline.cli.webhooks import webhooks
from pipeline.errors import RecurError, SettingsError
from pipeline.extras import require_gateway_packages
from pipeline.settings import CONFIG_VARIABLE, describe, load_settings
from pipeline.worker.shutdown import exit_on_signals


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=EXISTING_FILE, help=f"TOML file of settings (or {CONFIG_VARIABLE}).")
@click.version_option(package_name="recur", prog_name="recur")
def recur(config: Path | None) -> None:
    """Score card transactions as they happen, with a recurrent state for each account."""
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)


@recur.command()
def worker() -> None:
    """Run a worker of the consumer group until SIGTERM or Ctrl-C."""
    exit_on_signals()  # the imports below take a while
    from pipeline.worker.process import run_worker

    sys.exit(run_worker(load_settings()))


@recur.command()
def gateway() -> None:
    """Serve scores, labels, accounts and alerts over HTTP until SIGTERM or Ctrl-C.

    Any number of gateways run side by side. Workers must run, too: they compute the scores.
    """
    require_gateway_packages("the gateway")
    exit_on_signals()  # the imports below take a while
    from pipeline.gateway.process import run_gateway

    sys.exit(run_gateway(load_settings()))


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
@click.argument("output", type=OUTPUT_FILE)
@data_option("; without it they are simulated.")
@columns_option
@skip_unusable_option
@click.option("--train-until", metavar="DATE", help="Learn only from labels known before this day.")
@click.option("--test-from", metavar="DATE", help="First day of the measures.")
@click.option(
    "--label-delay-days",
    type=float,
    default=7.0,
    show_default=True,
    help="Days from a transaction until its label is known.",
)
@simulation_options(
    customers=5_000, terminals=10_000, days=183, world="wide", prefix="Simulation: "
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of data and weights.")
@click.option(
    "--hidden-size", type=int, default=128, show_default=True, help="Size of the hidden state."
)
@click.option("--layers", type=int, default=1, show_default=True, help="Number of GRU layers.")
@click.option("--epochs", type=int, help="Number of epochs; default: by the size of the data.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--no-probe", is_flag=True, help="Do not probe the checkpoint at the end.")
@click.option(
    "--no-forecast",
    "forecast",
    flag_value=False,
    default=True,
    type=bool,
    help="Fit no forecast head (see `recur forecast`).",
)
def train(
    output: Path,
    data: Path | None,
    columns: str | None,
    skip_unusable: bool,
    no_probe: bool,
    **options: Any,
) -> None:
    """Train a network on your transactions, or simulated ones; write its checkpoint to OUTPUT.

    An interrupted training continues where it stopped when you run the same command again. At
    the end the command probes the checkpoint (see `recur probe`). It exits with code 1 on a
    violation.
    """
    from model.checkpoint import CheckpointError
    from model.probe.sweeps import short_probe
    from model.simulator.handbook import SimulatorError
    from model.training.settings import TrainingError, TrainingSettings
    from model.training.train import train as train_network
    from pipeline.files.column_mapping import load_mapping
    from pipeline.files.training_data import FileData
    from pipeline.progress import TrainingProgress

    require_both("recur train", data, columns)
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
    """Print the live state in Redis of the account ID.

    The output has the probability that the account is compromised now, its counts and amounts,
    and the place and age of the state. The command needs the workers' settings.
    """
    from pipeline.admin.inspect_account import account_lines

    for line in asyncio.run(account_lines(load_settings(), account_id)):
        click.echo(line)


@recur.command()
@click.argument("account_id", metavar="ID")
@click.option(
    "--days",
    type=click.IntRange(1, 30),
    default=7,
    show_default=True,
    help="Number of days, from the next whole UTC day on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def forecast(account_id: str, days: int, as_json: bool) -> None:
    """Forecast the next days of the account ID from its live state in Redis.

    The output has for each day the number of payments, the amount spent, the largest payment, and
    the probabilities that the account stays silent and that a payment is fraud. The command needs
    the workers' settings, and a checkpoint with a forecast head.
    """
    import msgspec

    from pipeline.admin.forecast_account import load_forecast, print_forecast

    found = asyncio.run(load_forecast(load_settings(), account_id, days))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        print_forecast(found)


@recur.command()
@click.option("--account", metavar="ID", help="Only this account.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only N accounts, chosen by the hashes of their ids: the same ones each time.",
)
@click.option("--from", "from_time", metavar="TIME", help="Only scores of records at or after TIME")
@click.option("--to", "to_time", metavar="TIME", help="and before TIME (the record's CreateTime).")
@click.option(
    "--tolerance-hidden",
    type=click.FloatRange(min=0),
    default=2e-3,
    show_default=True,
    help="Hidden states that differ by at most this count as equal; see docs/verify.md.",
)
@click.option(
    "--tolerance-score",
    type=click.FloatRange(min=0),
    default=2e-4,
    show_default=True,
    help="Scores that differ by at most this count as equal.",
)
@json_option
def verify(
    account: str | None,
    sample: int | None,
    from_time: str | None,
    to_time: str | None,
    json_file: Path | None,
    **tolerances: float,
) -> None:
    """Verify that states in Redis and published scores match the log.

    The command recomputes both from the log, up to the watermarks, and compares. It writes
    nothing, and workers may run. It exits with code 1 if a state or score differs past its
    tolerance, a score is missing, two scores of one transaction contradict each other, or a state
    has no log. It lists accounts whose history began before the log as unverifiable. A TIME is
    2024-05-31T18:00:00Z or milliseconds since 1970. The command needs the workers' settings.
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
@click.argument("checkpoint", type=OUTPUT_FILE)
@click.option("--review", metavar="GOAL", help="Goal of the review threshold.")
@click.option("--decline", metavar="GOAL", help="Goal of the decline threshold.")
@click.option("--alerts-per-day", metavar="N", help="Short for --review alerts-per-day=N.")
@click.option(
    "--false-positive-rate", metavar="X", help="Short for --review false-positive-rate=X."
)
@click.option("--precision", metavar="P", help="Short for --review precision=P.")
@click.option(
    "--cost-missed",
    metavar="COST",
    help="Cost of a missed fraud: an amount, or per cent of the fraud's amount (default 100%).",
)
@click.option(
    "--cost-review", metavar="AMOUNT", help="Cost of a review, which always finds the truth."
)
@click.option(
    "--cost-decline",
    metavar="COST",
    help="Cost of declining a good payment: an amount, or per cent of the payment's amount.",
)
@dry_run_option
def thresholds(checkpoint: Path, dry_run: bool, **wishes: str | None) -> None:
    """Choose CHECKPOINT's review and decline thresholds by goals or by costs.

    A GOAL is one of alerts-per-day=N (at most; declined ones count), false-positive-rate=X
    (at most, of the legitimate transactions), precision=P (at least, of the alerts) or
    threshold=T; shares as 0.9 or 90%. With costs, both thresholds minimize the expected cost per
    day. A threshold without a goal stays as it is, except that decline is never below review.
    Without any option, the command prints the expectation of the current thresholds.

    \b
      recur thresholds model.safetensors --alerts-per-day 100
      recur thresholds model.safetensors --review false-positive-rate=0.2% \\
                                         --decline precision=0.9
      recur thresholds model.safetensors --cost-review 4 --cost-decline 30

    Weights and digest stay the same. Running workers whose RECUR_CHECKPOINT is this file use the
    new thresholds some seconds later.
    """  # noqa: D301 - to click a backspace means: do not wrap this paragraph
    from model.checkpoint import Checkpoint, CheckpointError
    from model.thresholds import OperatingPoints, ThresholdGoals, ThresholdsError, report

    try:
        loaded = Checkpoint.load(checkpoint)
        points, before = OperatingPoints(loaded.header), loaded.header.thresholds
        wanted = ThresholdGoals.parse(wishes)
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
@file_argument
@columns_option
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
    help="split: learn only from labels known before this day; default: half of the days.",
)
@click.option(
    "--test-from",
    metavar="DATE",
    help="split: first day of the test; default: when the training's labels are known.",
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
@click.option(
    "--label-delay-days",
    type=int,
    default=7,
    show_default=True,
    help="Days from a transaction until its label is known.",
)
@click.option(
    "--networks", metavar="A,B,...", help="Rows of the table to compare; default: all of them."
)
@click.option(
    "--seeds", type=int, default=1, show_default=True, help="Number of trainings of each network."
)
@click.option("--epochs", type=int, help="Number of epochs of each training.")
@click.option("--hidden-size", type=int, help="Size of each network's hidden state.")
@click.option(
    "--checkpoint",
    type=EXISTING_FILE,
    help="Compare this checkpoint, too; the model card describes it.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("evaluation"),
    show_default=True,
    help="Folder of results, plots and model card. It keeps trained networks for later runs.",
)
@click.option("--no-plots", is_flag=True, help="Write no plots; matplotlib is not needed then.")
@click.option("--no-robustness", is_flag=True, help="Do not measure the cost of faulty states.")
@click.option("--no-forecast", is_flag=True, help="Do not compare forecasts of accounts.")
@simulation_options(
    customers=None, terminals=None, days=None, world="handbook", prefix="Simulation, without FILE: "
)
def evaluate(**options: Any) -> None:
    """Compare networks, and LightGBM, on the transactions in FILE or on simulated ones.

    Prints a table and writes results.json, model_card.md, pr.png and calibration.png.
    """
    from pipeline.cli.evaluate import evaluate_options, run_evaluate

    run_evaluate(evaluate_options(**options))


@recur.command("probe")
@click.argument("checkpoint", type=EXISTING_FILE)
@data_option(": its accounts are probed, too.")
@columns_option
@json_option
@click.option(
    "--plot",
    type=OUTPUT_FILE,
    help="PNG file of scores by sweep and of exposure; needs matplotlib.",
)
@click.option("--short", is_flag=True, help="The short form, as at the end of `recur train`.")
def probe_command(**options: Any) -> None:
    """Test how CHECKPOINT behaves: sweeps, large payments, and what a thief can take.

    With the history fixed, more money or more known frauds at the merchant must not lower the
    score. The command prints each place where the score falls or an input leaves its range. It
    also prints the exposure: the most that a thief who knows the model takes below the review
    threshold. It exits with code 1 on a violation.
    """
    from pipeline.cli.probe import ProbeOptions, run_probe

    sys.exit(run_probe(ProbeOptions(**options)))


@recur.command()
@click.option(
    "--transactions",
    type=int,
    default=200_000,
    show_default=True,
    help="Number of transactions in the burst.",
)
@click.option(
    "--rate",
    type=float,
    default=500,
    show_default=True,
    help="Transactions per second of the live part.",
)
@click.option(
    "--seconds", type=float, default=30, show_default=True, help="Length of the live part."
)
@click.option(
    "--workers", type=int, default=2, show_default=True, help="Number of worker processes."
)
@world_option("wide")
@click.option("--generated", is_flag=True, help="Payments by the shipped generator.")
@click.option("--keep-running", is_flag=True, help="Continue the live part until Ctrl-C.")
def demo(**options: Any) -> None:
    """Watch it work: Kafka, Redis, workers and simulated payments with fraud, for a minute."""
    from pipeline.demo.run import DemoOptions, run_demo

    sys.exit(run_demo(DemoOptions(**options)))


@recur.command()
@file_argument
@columns_option
@click.option("--example-columns", is_flag=True, help="Print a column mapping to start from.")
@click.option("--speed", type=float, help="Send at the recorded pace times this factor.")
@click.option("--rate", type=float, help="Transactions per second; default: as fast as possible.")
@click.option("--warm", is_flag=True, help="Build states, raise no alerts.")
@click.option("--limit", type=int, help="Send only this number of transactions.")
@offset_days_option
@skip_unusable_option
@click.option("--allow-unsorted", is_flag=True, help="Send rows that are not in order of time.")
@click.option("--report", is_flag=True, help="Wait for the scores and print a summary.")
@click.option(
    "--report-skip-days",
    type=int,
    default=0,
    help="Number of first days that the summary leaves out.",
)
def replay(file: Path | None, columns: str | None, example_columns: bool, **options: Any) -> None:
    """Feed the transactions in FILE (parquet or CSV) to the workers."""
    from pipeline.files.column_mapping import example_mapping
    from pipeline.replay.replay import ReplayOptions, run_replay

    if example_columns:
        click.echo(example_mapping())
        return
    if file is None or columns is None:
        raise SettingsError(f"recur replay needs FILE and --columns; {EXAMPLE_HINT}")
    sys.exit(run_replay(ReplayOptions(file=file, columns=columns, **options), load_settings()))


@recur.command()
@file_argument
@click.option(
    "--columns",
    type=EXISTING_FILE,
    metavar="MAPPING",
    help="TOML file that names FILE's columns ([columns], [prefixes], [time]).",
)
@click.option(
    "--from-transactions",
    metavar="MAPPING",
    help="FILE holds transactions; this is their column mapping: a TOML file, or `handbook`.",
)
@click.option(
    "--delay-days",
    type=float,
    default=7.0,
    show_default=True,
    help="With --from-transactions: days from a transaction to its label.",
)
@click.option(
    "--legitimate", is_flag=True, help="With --from-transactions: label legitimate ones, too."
)
@offset_days_option
@click.option("--transaction-id", help="A single label: of this transaction,")
@click.option("--account-id", help="of this account")
@click.option("--merchant-id", help="at this merchant")
@click.option("--label", type=click.Choice(["fraud", "legitimate"]), help="is this")
@click.option("--timestamp", help="and was made then (ISO 8601 with zone, or milliseconds).")
@click.option("--labelled-at", help="Time when the label became known; default: now.")
def label(file: Path | None, **options: Any) -> None:
    """Send labels, the truth about transactions: those in FILE (parquet or CSV), or a single one.

    FILE has columns transaction_id, account_id, merchant_id, label (fraud or legitimate), timestamp
    (of the transaction) and labelled_at.
    """
    from pipeline.replay.labels import LabelOptions, run_label

    sys.exit(run_label(LabelOptions(file=file, **options), load_settings()))


recur.add_command(generate)
recur.add_command(train_generator)
recur.add_command(evaluate_generator)
recur.add_command(keys)
recur.add_command(state)
recur.add_command(trace)
recur.add_command(webhooks)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; print a known error as one line, without a traceback."""
    # NumPy reads it when it is imported. Two threads wait for each other: a step of 2,000 accounts
    # took 46 ms of CPU instead of 11.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
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
