"""The command line: ``recur COMMAND``. Each command is thin; its work is elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.errors import RecurError, SettingsError
from pipeline.settings import CONFIG_VARIABLE, describe, load_settings


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
    from pipeline.app import run_worker

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


def main(arguments: list[str] | None = None) -> Any:
    """Entry point; a known error ends with one line and no traceback."""
    try:
        recur(args=arguments, prog_name="recur")
    except SettingsError as error:
        _fail(error, 2)
    except RecurError as error:
        _fail(error, 1)


def _fail(error: RecurError, code: int) -> None:
    for line in str(error).splitlines():
        click.echo(f"recur: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
