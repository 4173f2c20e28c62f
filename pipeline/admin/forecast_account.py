"""One account's forecast from its live state, as `recur forecast ID` prints it.

The command only reads. The state is the workers', and nothing else is stored for a forecast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import date

import msgspec
import numpy as np
from rich.console import Console

from model.checkpoint import Checkpoint
from model.forecast.answer import DayForecast, day_forecasts
from model.forecast.forecaster import DaysError, Forecaster
from pipeline.admin.inspect_account import load_view, utc
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates
from pipeline.tables import print_table, widen

CHART_CHARACTERS = 32
"""Width of the chart of amounts."""

TABLE_COLUMNS = 110
"""Least width of the table, characters."""


class AccountForecast(msgspec.Struct, frozen=True):
    """The forecast of an account.

    Attributes:
        account_id: the account.
        model: digest of the checkpoint.
        currency: of all amounts.
        asked_at: moment of asking, epoch milliseconds.
        last_transaction_at: event time of the last payment, epoch milliseconds.
        transactions_seen: payments in the state.
        usual_amount: the account's usual payment.
        days: the days, from the first whole UTC day after the moment of asking.
    """

    account_id: str
    model: str
    currency: str
    asked_at: int
    last_transaction_at: int
    transactions_seen: int
    usual_amount: float
    days: list[DayForecast]


def forecaster_of(checkpoint: Checkpoint) -> Forecaster:
    """Return the checkpoint's forecast head.

    Raises:
        RecurError: it has none.
    """
    if checkpoint.forecaster is None:
        raise RecurError(
            f"the checkpoint (model {checkpoint.digest}) has no forecast head: train it again with "
            "`recur train` and without --no-forecast, and set RECUR_CHECKPOINT to the new file"
        )
    return checkpoint.forecaster


def forecast_state(
    checkpoint: Checkpoint, account_id: str, state: AccountStates, asked_ms: int, days: int
) -> AccountForecast:
    """Forecast an account from its state of one row.

    Raises:
        RecurError: the checkpoint has no forecast head, or the number of days is out of bounds.
    """
    history = state.history
    try:
        forecasts = forecaster_of(checkpoint).forecast(
            history, state.hidden, np.array([asked_ms]), days
        )
    except DaysError as error:
        raise RecurError(f"--days: {error}") from error
    return AccountForecast(
        account_id,
        checkpoint.digest,
        checkpoint.header.currency,
        asked_ms,
        int(history.last_event_ms[0]),
        int(history.count[0]),
        round(float(history.usual_amount[0]), 2),
        day_forecasts(forecasts),
    )


async def load_forecast(settings: Settings, account_id: str, days: int) -> AccountForecast:
    """Load the account's live state and forecast its next days.

    Raises:
        RecurError: there is nothing to print; the message says why.
    """
    checkpoint = load_checkpoint(settings)
    asked_ms = time.time_ns() // 1_000_000
    forecaster_of(checkpoint)  # its error comes before those of Kafka and Redis
    view = await load_view(settings, checkpoint, account_id)
    return forecast_state(checkpoint, account_id, view.state, asked_ms, days)


def print_forecast(found: AccountForecast, console: Console | None = None) -> None:
    """Print the forecast for a person: a few sentences, and a row with a chart for each day."""
    console = console or Console()
    widen(console, TABLE_COLUMNS)
    for line in sentences(found):
        console.print(line, highlight=False, markup=False)
    top = max((day.amount.p95 for day in found.days), default=0.0)
    rows = [
        [
            f"{date.fromisoformat(day.date):%a} {day.date}",
            f"{day.expected_payments:.1f}",
            f"{day.amount.p50:,.2f}",
            f"{day.amount.p10:,.0f} to {day.amount.p90:,.0f}",
            chart(day, top),
            f"{day.largest_payment.p90:,.2f}",
            f"{day.silent:.0%}",
            f"{day.fraud:.1%}",
        ]
        for day in found.days
    ]
    headings = ["day (UTC)", "payments", "median", "80 % within"]
    headings += [f"0 to {top:,.0f} {found.currency}".ljust(CHART_CHARACTERS)]
    headings += ["largest, 90 %", "silent", "fraud"]
    print_table(console, headings, rows)


def sentences(found: AccountForecast) -> Iterator[str]:
    """Yield what the forecast says in words."""
    last = found.days[-1]
    expected = sum(day.expected_payments for day in found.days)
    span = "1 day" if len(found.days) == 1 else f"{len(found.days)} days"
    yield (
        f"account {found.account_id}: {found.transactions_seen:,} payments seen, the last one at "
        f"{utc(found.last_transaction_at)}; it usually pays {found.usual_amount:,.2f} "
        f"{found.currency}"
    )
    yield (
        f"In the next {span} about {expected:,.1f} payments are expected. With probability "
        f"{last.silent:.1%} there is none up to {last.date}."
    )
    yield (
        "amount: sum of the day; largest: the day's largest payment is under it with 90 %; "
        "silent: no payment up to the day's end; fraud: a payment of the day is fraud"
    )


def chart(day: DayForecast, top: float) -> str:
    """Draw the amounts of a day: a line from 10 to 90 %, thick from 25 to 75 %, a dot at 50 %.

    >>> spread = dict(p5=0.0, p10=0.0, p25=4.0, p50=8.0, p75=12.0, p90=16.0, p95=16.0)
    >>> from model.forecast.answer import Spread
    >>> s = Spread(**spread)
    >>> chart(DayForecast("2026-01-01", 1.0, s, s, s, 0.1, 0.1, 0.0), 16.0)
    '────────━━━━━━━━●━━━━━━━────────'
    """

    def place(value: float) -> int:
        return min(CHART_CHARACTERS - 1, round(value / top * CHART_CHARACTERS)) if top > 0 else 0

    drawn = [" "] * CHART_CHARACTERS
    amount = day.amount
    for begin, end, mark in ((amount.p10, amount.p90, "─"), (amount.p25, amount.p75, "━")):
        last = place(end) + (end >= top > 0)
        for at in range(place(begin), max(last, place(begin) + 1)):
            drawn[at] = mark
    drawn[place(amount.p50)] = "●"
    return "".join(drawn)
