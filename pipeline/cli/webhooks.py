"""The commands `recur webhooks ...`: deliver alerts, and look after their endpoints."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from pipeline.settings import load_settings
from pipeline.worker.shutdown import exit_on_signals


@click.group(invoke_without_command=True)
@click.pass_context
def webhooks(context: click.Context) -> None:
    """Deliver alerts to the endpoints in RECUR_WEBHOOKS_FILE until SIGTERM or Ctrl-C.

    Any number of these processes run side by side and share the work. Webhooks are signed by
    Standard Webhooks 1.0.0. Without a further command, the process runs.
    """
    if context.invoked_subcommand is not None:
        return
    exit_on_signals()  # the imports below take a while
    from pipeline.webhooks.process import run_webhooks

    sys.exit(run_webhooks(load_settings()))


@webhooks.command("list")
def list_endpoints() -> None:
    """Print each endpoint: its state, how far it is behind, and the retries that wait."""
    from pipeline.webhooks.commands import list_lines

    _print(asyncio.run(list_lines(load_settings())))


@webhooks.command()
@click.argument("endpoint")
def test(endpoint: str) -> None:
    """Send a signed sample event to ENDPOINT, whatever its state is.

    It exits with code 1 if the endpoint does not take it.
    """
    from pipeline.webhooks.commands import send_test

    _print([asyncio.run(send_test(load_settings(), endpoint))])


@webhooks.command()
@click.argument("endpoint")
def pause(endpoint: str) -> None:
    """Let ENDPOINT get nothing until `resume`; its alerts wait in the topic."""
    from pipeline.webhooks.commands import switch_endpoint

    _print([asyncio.run(switch_endpoint(load_settings(), endpoint, "paused"))])


@webhooks.command()
@click.argument("endpoint")
def resume(endpoint: str) -> None:
    """Let ENDPOINT go on after `pause`, or after it answered 410 Gone."""
    from pipeline.webhooks.commands import switch_endpoint

    _print([asyncio.run(switch_endpoint(load_settings(), endpoint, None))])


@webhooks.command()
@click.argument("endpoint")
@click.option("--from", "from_time", metavar="TIME", required=True, help="Alerts at or after TIME")
@click.option("--to", "to_time", metavar="TIME", help="and before TIME; default: up to now.")
def replay(endpoint: str, from_time: str, to_time: str | None) -> None:
    """Deliver the alerts of a range of time to ENDPOINT again, with the same webhook ids.

    A TIME is 2024-05-31T18:00:00Z or milliseconds since 1970, by the records' CreateTime. The
    endpoint's filters apply, its position stays. The command tries each alert three times, lists
    those that failed, and exits with code 1 if there are any.
    """
    from pipeline.timestamps import epoch_ms_of
    from pipeline.webhooks.commands import Replay

    from_ms = epoch_ms_of(from_time, "--from")
    to_ms = None if to_time is None else epoch_ms_of(to_time, "--to")

    async def run() -> tuple[list[str], bool]:
        return await Replay(load_settings(), endpoint, from_ms, to_ms).run()

    lines, is_done = asyncio.run(run())
    _print(lines)
    sys.exit(0 if is_done else 1)


@webhooks.command()
@click.option("--ed25519", is_flag=True, help="A key pair instead of a symmetric secret.")
def secret(ed25519: bool) -> None:
    """Print a new secret for an endpoint: whsec_, or whsk_ and its public whpk_."""
    from pipeline.webhooks.signing import new_key_pair, new_secret

    _print(new_key_pair() if ed25519 else [new_secret()])


def _print(lines: Any) -> None:
    for line in lines:
        click.echo(line)
