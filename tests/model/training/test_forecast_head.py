"""The forecast head's training: true states and days, what it learns, and data that are too few."""

from __future__ import annotations

import numpy as np
import pytest

from model.data.dataset import LEGITIMATE, Dataset
from model.features.account import Float32
from model.forecast.forecaster import Forecaster
from model.training import forecast_head
from model.training.forecast_calibration import calibrate
from model.training.forecast_head import (
    ForecastData,
    draw_samples,
    fit_forecast_head,
    state_log,
)
from model.training.forecast_measures import covered, pinball_loss
from model.training.forecast_samples import DailyTable, Moments, last_positions, random_moments
from model.training.sequences import Sequences, score_stepwise
from model.training.split import Split
from model.units import DAY_MS
from tests.fakes.memory_workers import small_checkpoint

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DAYS = 60
START_MS = 17_600 * DAY_MS
SPLIT = Split(training=4, validation=40, gap=50, held_out=50, end=DAYS)
CHECKPOINT = small_checkpoint()


def steady_accounts(accounts: int = 60, fraud: bool = False) -> Dataset:
    """Make accounts that pay once or four times a day, 10 or 100 at a time."""
    rng = np.random.default_rng(0)
    account, time_ms = [], []
    for number in range(accounts):
        at = rng.uniform(0, DAYS, rng.poisson((1 + 3 * (number % 2)) * DAYS))
        account.append(np.full(len(at), number))
        time_ms.append(START_MS + (at * DAY_MS).astype(np.int64))
    accounts_of, times = np.concatenate(account), np.concatenate(time_ms)
    order = np.argsort(times, kind="stable")
    accounts_of, times = accounts_of[order], times[order]
    n = len(times)
    amount = np.where(accounts_of % 4 < 2, 10.0, 100.0) * rng.uniform(0.5, 1.5, n)
    label = np.full(n, LEGITIMATE, np.int8)
    if fraud:
        label[rng.random(n) < 0.02] = 1
    return Dataset(
        accounts_of.astype(np.int32), np.zeros(n, np.int32), amount.round(2), times, label, label
    )


def data_of(dataset: Dataset, split: Split = SPLIT) -> ForecastData:
    spec = CHECKPOINT.header.features
    raw = np.zeros((len(dataset), len(spec.names)), np.float32)
    return ForecastData(dataset, Sequences(dataset.account), raw, spec, split)


@pytest.fixture(scope="module")
def learned() -> tuple[ForecastData, dict[str, Float32]]:
    """Fit a head to steady accounts, with few updates."""
    data = data_of(steady_accounts())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast_head, "UPDATES", 120)
        patch.setattr(forecast_head, "BATCH", 128)
        head = fit_forecast_head(CHECKPOINT.stepper, data, seed=1)
    assert head is not None
    return data, head.weights


def test_the_states_of_samples_are_those_of_a_worker() -> None:
    dataset = steady_accounts(8)
    data = data_of(dataset)
    log = state_log(CHECKPOINT.stepper, data)
    part = np.arange(8)
    asked = np.full(8, START_MS + 30 * DAY_MS + 5)
    position = last_positions(dataset, data.sequences, part, asked)
    samples = log.samples(data.sequences, Moments(part, position, asked), DAYS)

    seen = dataset.timestamp_ms <= asked[0]
    account, amount = dataset.account[seen].astype(np.int64), dataset.amount[seen]
    _, history, hidden = score_stepwise(CHECKPOINT, account, amount, dataset.timestamp_ms[seen])
    assert (samples.asked.count == history.count).all()
    assert (samples.asked.hidden == hidden[:, 0]).all()
    assert np.ptp(hidden) > 0.1, "equal states would prove nothing"
    assert samples.asked.first_day.tolist() == [17_631] * 8


def test_the_days_after_are_those_of_the_account() -> None:
    dataset = steady_accounts(8, fraud=True)
    after = DailyTable(dataset).after(np.array([3, 5]), np.array([17_650, 17_599]), 55, from_day=2)

    assert after.known[0].tolist() == [True] * 5 + [False] * 25
    assert after.known[1].tolist() == [False] * 3 + [True] * 27
    for row, account, first in ((0, 3, 50), (1, 5, -1)):
        for ahead in np.flatnonzero(after.known[row]):
            mine = (dataset.account == account) & (dataset.day == first + ahead)
            assert after.count[row, ahead] == mine.sum()
            assert after.amount[row, ahead] == pytest.approx(dataset.amount[mine].sum(), rel=1e-5)
            assert after.largest[row, ahead] == pytest.approx(dataset.amount[mine].max(initial=0))
            assert after.is_fraud[row, ahead] == dataset.is_fraud[mine].any()


def test_moments_are_after_a_payment_of_their_account_and_within_their_days() -> None:
    dataset = steady_accounts(20)
    sequences = Sequences(dataset.account)
    for young in (False, True):
        moments = random_moments(dataset, sequences, (10, 20), 500, 1, young=young)
        row = sequences.row[moments.position]
        day = (moments.asked_ms - START_MS) / DAY_MS
        assert len(day) > 50
        assert ((day >= 10) & (day < 20)).all()
        assert (dataset.timestamp_ms[row] <= moments.asked_ms).all()
        assert (dataset.account[row] == moments.part).all()
        following = np.minimum(moments.position + 1, len(dataset) - 1)
        is_last = (
            moments.position + 1 == sequences.start[moments.part] + sequences.length[moments.part]
        )
        later = dataset.timestamp_ms[sequences.row[following]] > moments.asked_ms
        assert (later | is_last).all()


def test_a_head_tells_busy_accounts_from_quiet_ones_and_is_calibrated(
    learned: tuple[ForecastData, dict[str, Float32]],
) -> None:
    data, weights = learned
    log = state_log(CHECKPOINT.stepper, data)
    test = draw_samples(log, data.sequences, (50, 59), DAYS, seed=9, whole=True)
    found = Forecaster(weights, data.spec.scale).decode(test.asked)
    known = test.after.known
    busy = (test.account % 2 == 1)[:, None] & known
    quiet = (test.account % 2 == 0)[:, None] & known
    assert found.mean_payments[busy].mean() == pytest.approx(4.0, rel=0.2)
    assert found.mean_payments[quiet].mean() == pytest.approx(1.0, rel=0.4)
    large = (test.account % 4 >= 2)[:, None] & known
    small = (test.account % 4 < 2)[:, None] & known
    median = found.amount[..., 3]
    assert 7 < median[large].mean() / median[small].mean() < 13
    inside = covered(found.amount, test.after.amount, found.none)
    assert inside[known].mean() == pytest.approx(0.8, abs=0.06)
    assert found.silent[:, 2].mean() < 0.1


def test_calibration_corrects_a_head_that_forecasts_too_much(
    learned: tuple[ForecastData, dict[str, Float32]],
) -> None:
    data, weights = learned
    wrong = {name: value.copy() for name, value in weights.items()}
    wrong["output.bias"][0] += np.log(2.0)  # twice as many payments
    wrong["output.bias"][[2, 10]] += np.log(1.5)  # amounts half as large again
    log = state_log(CHECKPOINT.stepper, data)
    days = draw_samples(log, data.sequences, (40, 49), 50, seed=4, from_day=40)
    right = calibrate(wrong, data.spec.scale, days)

    known = days.after.known
    before = Forecaster(wrong, data.spec.scale).decode(days.asked)
    after = Forecaster(right, data.spec.scale).decode(days.asked)
    truth = days.after.count[known].mean()
    assert before.mean_payments[known].mean() > 1.7 * truth
    assert after.mean_payments[known].mean() < 1.55 * truth
    assert (
        pinball_loss(after.amount, days.after.amount)[known].mean()
        < 0.97 * pinball_loss(before.amount, days.after.amount)[known].mean()
    )


def test_data_without_fraud_give_a_head_that_forecasts_hardly_any(
    learned: tuple[ForecastData, dict[str, Float32]],
) -> None:
    data, weights = learned
    log = state_log(CHECKPOINT.stepper, data)
    test = draw_samples(log, data.sequences, (50, 59), DAYS, seed=9)
    assert Forecaster(weights, data.spec.scale).decode(test.asked).fraud.mean() < 0.02


def test_too_few_accounts_give_no_head() -> None:
    data = data_of(steady_accounts(2))
    assert fit_forecast_head(CHECKPOINT.stepper, data, seed=1) is None


def test_the_same_seed_gives_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_head, "UPDATES", 5)
    monkeypatch.setattr(forecast_head, "SAMPLES_FOR_ACCOUNT", 10)
    data = data_of(steady_accounts(30))
    first, again = (fit_forecast_head(CHECKPOINT.stepper, data, seed=2) for _ in range(2))
    assert first is not None
    assert again is not None
    for name, weight in first.weights.items():
        assert np.array_equal(weight, again.weights[name]), name
