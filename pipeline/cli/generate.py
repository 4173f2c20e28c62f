"""The commands `recur generate`, `recur train-generator` and `recur evaluate-generator`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    EXISTING_FILE,
    OUTPUT_FILE,
    columns_option,
    data_option,
    file_argument,
    require_both,
    simulation_options,
    skip_unusable_option,
)
from pipeline.errors import SettingsError
from pipeline.settings import load_settings

like_option = click.option(
    "--like",
    type=EXISTING_FILE,
    help="Generator of `recur train-generator`; default: the shipped one.",
)


@click.command()
@click.argument("output", type=OUTPUT_FILE, required=False)
@click.option("--accounts", type=int, default=1000, show_default=True, help="Number of accounts.")
@click.option("--days", type=int, default=90, show_default=True, help="Number of days.")
@click.option(
    "--profile", type=EXISTING_FILE, help="TOML file of what all accounts share, see below."
)
@like_option
@click.option("--seed", type=int, default=1, show_default=True, help="Decides every transaction.")
@click.option("--start-date", metavar="DATE", help="First day; default: that of the training data.")
@click.option("--to-topic", is_flag=True, help="Send to the transactions topic, not to a file.")
@click.option("--rate", type=float, help="With --to-topic: transactions per second.")
def generate(
    output: Path | None,
    profile: Path | None,
    like: Path | None,
    start_date: str | None,
    to_topic: bool,
    rate: float | None,
    **options: Any,
) -> None:
    """Generate labelled transactions of invented accounts; write them to OUTPUT.

    OUTPUT is a .parquet or .csv file. OUTPUT.mapping.toml gets its column mapping, for
    `recur train` and `recur replay`. The same seed gives the same transactions. A profile file
    has any of: mean_amount, deviation, payments_per_day, hour, weekend_share, merchants,
    loyalty, hub_share, defrauded (a probability), fraud_factor, bursts.
    """
    from pipeline.files.generated import check_output, given_profile, write_generated
    from pipeline.files.generated_stream import SHIPPED_GENERATOR, open_stream
    from pipeline.progress import Bar
    from pipeline.replay.generated import send_generated

    if (output is None) != to_topic:
        raise SettingsError("recur generate takes OUTPUT or --to-topic, one of them")
    if rate is not None and (not to_topic or not 0 < rate < float("inf")):
        raise SettingsError("--rate belongs to --to-topic, and it must be over 0")
    if output is not None:
        check_output(output)
    stream = open_stream(
        like or SHIPPED_GENERATOR, given_profile(profile), start_date=start_date, **options
    )
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if output is None:
        code, sent = send_generated(stream, load_settings(), rate, console)
        click.echo(f"sent {sent:,} generated transactions")
        sys.exit(code)
    with Bar(console, "generate") as bar:
        written = write_generated(
            stream, output, lambda count, share: bar.show("generating", count, share)
        )
    click.echo(f"{output}: {written:,} transactions of {options['accounts']:,} accounts")


@click.command("train-generator")
@click.argument("output", type=OUTPUT_FILE)
@data_option("; without it they are simulated.")
@columns_option
@skip_unusable_option
@simulation_options(
    customers=5_000, terminals=10_000, days=183, world="handbook", prefix="Simulation: "
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of data and weights.")
@click.option("--epochs", type=int, default=6, show_default=True, help="Number of epochs.")
@click.option(
    "--hidden-size", type=int, default=48, show_default=True, help="Size of the hidden state."
)
def train_generator(
    output: Path,
    data: Path | None,
    columns: str | None,
    skip_unusable: bool,
    **options: Any,
) -> None:
    """Train a generator on your transactions, or simulated ones; write it to OUTPUT.

    It takes the column mapping of `recur train`. `recur generate --like OUTPUT` uses it.
    """
    from pipeline.cli.generator_runs import run_train_generator

    require_both("recur train-generator", data, columns)
    for line in run_train_generator(output, data, columns, skip_unusable, **options):
        click.echo(line)


@click.command("evaluate-generator")
@file_argument
@columns_option
@click.option(
    "--accounts",
    type=click.IntRange(min=100),
    default=1000,
    show_default=True,
    help="Accounts that train the generator; as many others are compared with.",
)
@simulation_options(
    customers=5_000,
    terminals=10_000,
    days=183,
    world="handbook",
    prefix="Simulation, without FILE: ",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the comparison.")
@click.option("--epochs", type=int, default=6, show_default=True, help="The generator's epochs.")
@click.option(
    "--detector-epochs",
    type=int,
    default=6,
    show_default=True,
    help="Epochs of the networks that learn from real and from generated histories.",
)
@click.option("--no-detector", is_flag=True, help="Leave out training on synthetic data.")
@click.option(
    "--peer",
    type=EXISTING_FILE,
    help="Parquet file of histories by another generator, in the form of `recur generate`.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("generator-evaluation"),
    show_default=True,
    help="Folder of results, plots and card.",
)
@click.option("--no-plots", is_flag=True, help="Write no plots; matplotlib is not needed then.")
def evaluate_generator(**options: Any) -> None:
    """Measure how well generated histories stand for the real ones in FILE, or simulated ones.

    Trains a generator on some accounts and compares it with others: discriminators, training on
    synthetic data, distances, privacy. Writes results.json, card.md and plots.
    """
    from pipeline.cli.generator_runs import run_evaluate_generator

    run_evaluate_generator(**options)
