"""The command `recur trace`: one transaction's way through the topics."""

from __future__ import annotations

import click

from pipeline.settings import load_settings


@click.command()
@click.argument("transaction_id", metavar="TRANSACTION_ID")
@click.option(
    "--since",
    metavar="TIME",
    default="1h",
    show_default=True,
    help="Search back to here: a duration before now (90s, 15m, 6h, 2d) or a time"
    " (2024-05-31T18:00:00Z, or milliseconds since 1970).",
)
@click.option("--account", "account_id", metavar="ID", help="Its account: searches faster.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def trace(transaction_id: str, since: str, account_id: str | None, as_json: bool) -> None:
    """Print the way of TRANSACTION_ID through the topics, with the time at each stage.

    The command reads records' headers and times; it needs no collector, no Redis and no worker.
    It searches the scores from now backwards. A score names its transaction's offset. Alerts and
    labels are searched from the score on.
    """
    from pipeline.tracing.journey_report import journey_json, journey_lines, trace_transaction

    journey = trace_transaction(load_settings(), transaction_id, since=since, account_id=account_id)
    if as_json:
        click.echo(journey_json(journey))
        return
    for line in journey_lines(journey):
        click.echo(line)
