"""`recur forecast`: its sentences and chart, its JSON, and what it says when it cannot."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from model.forecast.shape import DAYS_MAX
from pipeline.admin.forecast_account import AccountForecast, forecast_state, print_forecast
from pipeline.cli.main import recur
from pipeline.errors import RecurError
from pipeline.storage.account_state import AccountStates, StateCodec
from tests.fakes.forecasts import some_histories, with_random_forecast
from tests.fakes.memory_workers import small_checkpoint

PLAIN = small_checkpoint()
CHECKPOINT = with_random_forecast(PLAIN)
ASKED_MS = 1_530_600_000_000


def state() -> AccountStates:
    states, _, _ = StateCodec.of(CHECKPOINT).decode([None])
    states.history.put(slice(None), some_histories(1))
    states.hidden[:] = np.linspace(-1, 1, 8)
    return states


def found(days: int = 7) -> AccountForecast:
    return forecast_state(CHECKPOINT, "A1", state(), ASKED_MS, days)


def test_the_output_says_in_words_and_in_a_chart_what_is_coming() -> None:
    forecast = found()
    written = io.StringIO()
    print_forecast(forecast, Console(file=written, width=160))
    text = written.getvalue()

    assert "account A1:" in text
    assert f"it usually pays {forecast.usual_amount:,.2f} EUR" in text
    assert "In the next 7 days about" in text
    assert "With probability" in text
    lines = [line for line in text.splitlines() if "●" in line]
    assert [line.split()[1] for line in lines] == [day.date for day in forecast.days]
    assert lines[0].startswith("Wed 2018-07-04")


def test_json_has_every_value_of_every_day() -> None:
    forecast = found(DAYS_MAX)
    values = msgspec.json.decode(msgspec.json.encode(forecast))

    assert (values["account_id"], values["currency"]) == ("A1", "EUR")
    assert values["model"] == CHECKPOINT.digest
    assert len(values["days"]) == DAYS_MAX
    for day in values["days"]:
        for name in ("payments", "amount", "largest_payment"):
            spread = [day[name][f"p{level}"] for level in (5, 10, 25, 50, 75, 90, 95)]
            assert spread == sorted(spread)
    silent = [day["silent"] for day in values["days"]]
    assert silent == sorted(silent, reverse=True)


def test_a_checkpoint_without_a_head_is_named() -> None:
    with pytest.raises(RecurError, match=f"{PLAIN.digest}.* has no forecast head: train it again"):
        forecast_state(PLAIN, "A1", state(), ASKED_MS, 7)


@pytest.mark.parametrize("days", [0, 31])
def test_a_wrong_number_of_days_is_named(days: int) -> None:
    with pytest.raises(RecurError, match=f"--days: {days} days; a forecast has 1 to 30"):
        found(days)


def test_the_command_rejects_what_it_cannot_forecast(tmp_path: Path) -> None:
    answer = CliRunner().invoke(recur, ["forecast", "A1", "--days", "31"])
    assert answer.exit_code == 2
    assert "31 is not in the range 1<=x<=30" in answer.output

    path = tmp_path / "plain.safetensors"
    PLAIN.save(path)
    answer = CliRunner().invoke(recur, ["forecast", "A1"], env={"RECUR_CHECKPOINT": str(path)})
    assert answer.exit_code != 0
    assert "has no forecast head" in str(answer.exception) + answer.output
