"""The commands ``recur state ...``: what the accounts' states are, and how to mend them."""

from __future__ import annotations

import sys
from typing import Any

import click

from pipeline.errors import SettingsError
from pipeline.settings import load_settings


@click.group()
def state() -> None:
    """Look at accounts' states, rebuild, forget and move them, while workers run or not."""


@state.command()
@click.argument("account_id", metavar="ACCOUNT")
def show(account_id: str) -> None:
    """Print the state of ACCOUNT that is in Redis, and where it lies."""
    import asyncio

    from pipeline.admin.inspect_state import shown_lines

    for line in asyncio.run(shown_lines(load_settings(), account_id)):
        click.echo(line)


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

    The state is the one after the last record before the first that came after TIME. It is
    computed up to the watermark at most: what is not applied yet has no score to compute from.
    """
    from pipeline.admin.inspect_state import lines_at
    from pipeline.timestamps import epoch_ms_of

    for line in lines_at(load_settings(), account_id, epoch_ms_of(at_time, "--time")):
        click.echo(line)


@state.command()
@click.argument("account_id", metavar="ACCOUNT")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the workers have applied it.")
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, help="Longest wait, seconds."
)
def forget(account_id: str, dry_run: bool, no_wait: bool, timeout: float) -> None:
    """Erase ACCOUNT: its state goes, and it begins anew at its next transaction.

    An instruction is put into the log behind the account's transactions; workers, caches, replays
    and `recur verify` come to it in the account's order. The receipt on standard output says what
    is erased, and which records remain until when. ACCOUNT `-` reads the id from standard input,
    so that it stands in no list of processes.
    """
    import asyncio

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
    for line in lines:
        click.echo(line)
    sys.exit(0 if done else 1)


@state.command()
@click.option("--partition", "partitions", type=int, multiple=True, help="One or more.")
@click.option("--all", "everything", is_flag=True, help="All partitions.")
@click.option("--merchants", is_flag=True, help="The merchants' profiles.")
@click.option(
    "--new-log", is_flag=True, help="What is of a topic that was deleted and made again since."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the workers are through.")
def rebuild(
    partitions: tuple[int, ...],
    everything: bool,
    merchants: bool,
    new_log: bool,
    dry_run: bool,
    no_wait: bool,
) -> None:
    """Have the workers compute states again from the log, as far back as it reaches.

    Workers may run: they keep the scores that were published, and score what comes as soon as
    they are through the log. Without workers it is done when one starts. With --merchants this
    command counts what scores and labels say, and corrects the profiles that differ. With --new-log
    states of a topic that was deleted and made again go, and begin from the one that is there.
    """
    import asyncio

    from pipeline.admin.rebuild_merchants import rebuild_merchants_lines
    from pipeline.admin.rebuild_states import rebuild_lines

    if bool(partitions) + everything + merchants + new_log != 1:
        raise SettingsError(
            "recur state rebuild takes --partition N, --all or --merchants, or --new-log"
        )
    if merchants:
        told = rebuild_merchants_lines(load_settings(), dry_run=dry_run, console=_console())
        for line in asyncio.run(told):
            click.echo(line)
        return
    lines = asyncio.run(
        rebuild_lines(
            load_settings(),
            sorted(set(partitions)) if partitions else None,
            dry_run=dry_run,
            wait=not no_wait,
            console=_console(),
            new_log=new_log,
        )
    )
    for line in lines:
        click.echo(line)


@state.command()
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--accept-stranded",
    is_flag=True,
    help="Go on although records of accounts that move wait in their old partitions.",
)
def rekey(dry_run: bool, accept_stranded: bool) -> None:
    """Move states to where their accounts' records go, after the topic got more partitions.

    Stop the producers; when the workers have applied everything, stop them; add partitions to the
    transactions topic; run this command, which gives the scores topic as many; start the workers
    and the producers. It refuses while workers run. Cut off, it goes on when it is run again.
    """
    import asyncio

    from pipeline.admin.repartition import rekey_lines

    lines = asyncio.run(
        rekey_lines(
            load_settings(), dry_run=dry_run, accept_stranded=accept_stranded, console=_console()
        )
    )
    for line in lines:
        click.echo(line)


def _console() -> Any:
    """Progress goes to standard error: standard output is the answer."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
