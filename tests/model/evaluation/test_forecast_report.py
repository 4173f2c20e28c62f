"""The comparison of forecasts: every way is measured on the same days, and the head follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.evaluation import forecast_baselines, forecast_following
from model.evaluation.forecast_baselines import AccountDays, own_mean, own_quantiles, smoothed
from model.evaluation.forecast_following import measure_following, silence_of_closed
from model.evaluation.forecast_report import HEAD, compare_forecasts, forecast_table
from model.forecast.shape import LEVELS
from model.training.forecast_head import held_out_samples, state_log
from model.training.forecast_measures import covered, pinball_loss
from tests.fakes.forecasts import with_random_forecast
from tests.model.training.test_forecast_head import CHECKPOINT, SPLIT, data_of, steady_accounts

SHIPPED = Path(__file__).parents[3] / "pipeline" / "checkpoints" / "default.safetensors"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.slow
def test_every_way_is_measured_on_the_same_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_baselines, "TREES", 5)
    monkeypatch.setattr(forecast_following, "ACCOUNTS", 4)
    data = data_of(steady_accounts())
    found = compare_forecasts(with_random_forecast(CHECKPOINT), data, 1)
    assert found is not None
    titles = [row.title for row in found.rows]
    assert titles[0] == HEAD
    assert titles[-1] == "LightGBM, windows"
    by_title = {row.title: row for row in found.rows}
    # The accounts are steady, so their own days are the best there is.
    assert by_title["own quantiles"].amount < by_title[HEAD].amount
    assert by_title["own quantiles"].payments < by_title["exponential smoothing"].payments * 1.05
    assert by_title["own quantiles"].plain_coverage == pytest.approx(0.85, abs=0.1)
    assert {"all", "Mon", "Sun", "30-99 payments"} <= found.groups.keys()
    headings, rows = forecast_table(found)
    assert all(len(row) == len(headings) for row in rows)
    assert compare_forecasts(CHECKPOINT, data, 1) is None


def test_the_baselines_see_no_day_from_the_moment_of_asking_on() -> None:
    dataset = steady_accounts(10)
    data = data_of(dataset)
    test = held_out_samples(state_log(CHECKPOINT.stepper, data), data.sequences, SPLIT, 1, 40)
    days = AccountDays(dataset, test.account)
    found = [own_quantiles(days.amount, days, test, 20), own_mean(days.amount, days, test)]
    found.append(smoothed(days.amount, days, test))
    _, end = days.place(test)
    later = np.arange(days.amount.shape[1]) >= end.min()
    days.amount[:, later] = 1e9
    first = np.flatnonzero(end == end.min())
    again = [own_quantiles(days.amount, days, test, 20), own_mean(days.amount, days, test)]
    again.append(smoothed(days.amount, days, test))
    for before, after in zip(found, again, strict=True):
        np.testing.assert_array_equal(before[first], after[first])
    assert (again[1] > found[1] + 1e5).any(), "other moments see the change"


def test_smoothing_finds_the_level_of_a_steady_account() -> None:
    dataset = steady_accounts(10)
    data = data_of(dataset)
    test = held_out_samples(state_log(CHECKPOINT.stepper, data), data.sequences, SPLIT, 1, 40)
    days = AccountDays(dataset, test.account)
    median = smoothed(days.count, days, test)[:, 0, LEVELS.index(0.5)]
    busy = test.account % 2 == 1
    assert median[busy].mean() == pytest.approx(4.0, rel=0.25)
    assert median[~busy].mean() == pytest.approx(1.0, rel=0.35)


def test_a_perfect_forecast_covers_80_percent_also_with_days_without_payment() -> None:
    rng = np.random.default_rng(0)
    none = rng.uniform(0, 1, 40_000)
    truth = np.where(rng.random(40_000) < none, 0.0, rng.exponential(1.0, 40_000))
    above = np.clip((np.array(LEVELS) - none[:, None]) / (1 - none[:, None]), 0, 1 - 1e-12)
    quantiles = -np.log1p(-above)
    assert covered(quantiles, truth, none).mean() == pytest.approx(0.8, abs=0.01)
    assert covered(quantiles, truth, None).mean() > 0.85
    worse = pinball_loss(quantiles * 1.3, truth).mean()
    assert pinball_loss(quantiles, truth).mean() < worse


@pytest.mark.slow
def test_the_shipped_forecast_follows_accounts_that_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast_following, "ACCOUNTS", 30)
    monkeypatch.setattr(forecast_following, "AFTER_PAYMENTS", (2, 20, 80))
    shipped = Checkpoint.load(SHIPPED)
    for found in measure_following(shipped):
        assert found.share[2] < found.share[20] < found.share[80], found
        assert found.share[80] > 0.4, found
    silent = silence_of_closed(shipped)
    assert silent[1] < 0.1
    assert list(silent.values()) == sorted(silent.values())
    assert silent[30] > 0.4
