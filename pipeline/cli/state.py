"""The commands `recur state ...`: inspect, rebuild, forget and move accounts' states."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

import click

from pipeline.cli.options import dry_run_option
from pipeline.errors import SettingsError
from pipeline.settings import load_settings


@click.group()
def state() -> None:
    """Inspect accounts' states; rebuild, forget and move them by hand."""


@state.command()
@click.argument("account_id", metavar="ACCOUNT")
def show(account_id: str) -> None:
    """Print the state of ACCOUNT that is in Redis, and where it lies."""
    from pipeline.admin.inspect_state import show_lines

    _print(asyncio.run(show_lines(load_settings(), account_id)))


@state.command()
@click.argument("account_id", metavar="ACCOUNT")
@click.option(
    "--time",
    "at_time",
    metavar="TIME",
    required=True,
    help="By records' CreateTime: 2024-05-31T18:00:00Z or milliseconds since 1970.",
)
def at(account_id: str, at_time: str) -> None:
    """Print the state of ACCOUNT as of a TIME, computed from the log.

    The computation ends before the first record that came after TIME, and at the watermark at the
    latest: a later transaction has no score yet from which to take its merchant's features.
    """
    from pipeline.admin.inspect_state import state_at_lines
    from pipeline.timestamps import epoch_ms_of

    _print(state_at_lines(load_settings(), account_id, epoch_ms_of(at_time, "--time")))


@state.command()
@click.argument("account_id", metavar="ACCOUNT")
@dry_run_option
@click.option("--no-wait", is_flag=True, help="Do not wait until the workers have applied it.")
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, help="Longest wait, seconds."
)
def forget(account_id: str, dry_run: bool, no_wait: bool, timeout: float) -> None:
    """Erase the state of ACCOUNT: its next transaction starts a new one.

    The command appends a control record to the log, after the account's transactions. Workers,
    caches, replays and `recur verify` apply it in the order of the log. The receipt on standard
    output lists what is erased, and which records remain until when. ACCOUNT `-` reads the id
    from standard input, so that no list of processes shows it.
    """
    from pipeline.admin.forget import forget_lines

    if account_id == "-":
        account_id = sys.stdin.readline().rstrip("\r\n")
    lines, done = asyncio.run(
        forget_lines(
            load_settings(),
            account_id,
            dry_run=dry_run,
            wait_seconds=0.0 if no_wait else timeout,
            console=_console(),
        )
    )
    _print(lines)
    sys.exit(0 if done else 1)


@state.command()
@click.option("--partition", "partitions", type=int, multiple=True, help="One or more.")
@click.option("--all", "everything", is_flag=True, help="All partitions.")
@click.option("--merchants", is_flag=True, help="The merchants' profiles.")
@click.option(
    "--new-log", is_flag=True, help="States and labels of a topic that was deleted and recreated."
)
@dry_run_option
@click.option("--no-wait", is_flag=True, help="Do not wait until the workers have finished.")
def rebuild(
    partitions: tuple[int, ...],
    everything: bool,
    merchants: bool,
    new_log: bool,
    dry_run: bool,
    no_wait: bool,
) -> None:
    """Have the workers recompute states from the log, as far back as it reaches.

    Workers may run: they keep the published scores, and score new transactions once they have
    read the log. Without workers, the next one to start does it. With --merchants, this command
    itself counts scores and labels, and corrects the profiles that differ. With --new-log, states
    of a topic that was deleted and recreated are deleted, and start from the current log.
    """
    from pipeline.admin.rebuild_merchants import rebuild_merchants_lines
    from pipeline.admin.rebuild_states import rebuild_lines

    if bool(partitions) + everything + merchants + new_log != 1:
        raise SettingsError(
            "recur state rebuild takes --partition N, --all or --merchants, or --new-log"
        )
    if merchants:
        _print(
            asyncio.run(
                rebuild_merchants_lines(load_settings(), dry_run=dry_run, console=_console())
            )
        )
        return
    _print(
        asyncio.run(
            rebuild_lines(
                load_settings(),
                sorted(set(partitions)) if partitions else None,
                dry_run=dry_run,
                wait=not no_wait,
                console=_console(),
                new_log=new_log,
            )
        )
    )


@state.command()
@dry_run_option
@click.option(
    "--accept-stranded",
    is_flag=True,
    help="Go on although records of accounts that move wait in their old partitions.",
)
def repartition(dry_run: bool, accept_stranded: bool) -> None:
    """Move states to their accounts' new partitions, after the topic got more partitions.

    Stop the producers. Once the workers have applied everything, stop them. Add partitions to the
    transactions topic, and run this command; it adds as many to the scores topic. Then start the
    workers and the producers. The command refuses while workers run. If interrupted, run it again.
    """
    from pipeline.admin.repartition import repartition_lines

    _print(
        asyncio.run(
            repartition_lines(
                load_settings(),
                dry_run=dry_run,
                accept_stranded=accept_stranded,
                console=_console(),
            )
        )
    )


@state.command(
    "rekey",
    hidden=True,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def renamed_rekey() -> None:
    """Refuse the command's old name, and say the new one."""
    raise SettingsError("there is no command `recur state rekey`: run `recur state repartition`")


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _console() -> Any:
    """Return a console on standard error for progress: standard output holds the answer alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
