"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.errors import SettingsError

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
EXAMPLE_HINT = "`recur replay --example-columns` prints a column mapping to start from"
WORLDS = ("wide", "handbook", "changing")

file_argument = click.argument("file", type=EXISTING_FILE, required=False)
columns_option = click.option(
    "--columns", metavar="MAPPING", help="Column mapping: a TOML file, or `handbook`."
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Print what the command would do, and change nothing."
)
json_option = click.option(
    "--json", "json_file", type=OUTPUT_FILE, help="Also write the findings to this file."
)
offset_days_option = click.option(
    "--offset-days", type=float, default=0.0, help="Days to add to every time."
)
skip_unusable_option = click.option(
    "--skip-unusable", is_flag=True, help="Leave out rows that are not valid transactions."
)


def data_option(help: str) -> Decorator[Any]:
    """Make the option for a file of labelled transactions."""
    return click.option(
        "--data",
        type=EXISTING_FILE,
        help=f"Parquet or CSV file of labelled transactions{help}",
    )


def world_option(default: str, prefix: str = "") -> Decorator[Any]:
    """Make the option for the kind of simulated transactions."""
    text = "Many kinds of accounts and fraud; those of the Handbook; many, whose rate changes."
    return click.option(
        "--world",
        type=click.Choice(WORLDS),
        default=default,
        show_default=True,
        help=f"{prefix}{text}",
    )


def simulation_options(
    *,
    customers: int | None,
    terminals: int | None,
    days: int | None,
    world: str,
    prefix: str,
) -> Decorator[Any]:
    """Make the options for simulated transactions, with a command's own defaults."""

    def decorate(command: Any) -> Any:
        command = world_option(world, prefix)(command)
        for name, default, text in (
            ("--days", days, "Number of days."),
            ("--terminals", terminals, "Number of terminals."),
            ("--customers", customers, "Number of accounts."),
        ):
            option = click.option(
                name,
                type=int,
                default=default,
                show_default=default is not None,
                help=f"{prefix}{text}",
            )
            command = option(command)
        return command

    return decorate


def require_both(command: str, data: Path | None, columns: str | None) -> None:
    """Refuse ``--data`` without ``--columns``, and the reverse.

    Raises:
        SettingsError: one of them is missing.
    """
    if (data is None) != (columns is None):
        raise SettingsError(f"{command} takes --data and --columns together; {EXAMPLE_HINT}")
