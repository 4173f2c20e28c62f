"""Views and distances of histories: known values on a log made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model.data.dataset import Dataset
from model.evaluation.discriminators import WINDOW_STEPS, windows_of
from model.evaluation.history_distances import distances, privacy, quantities
from model.evaluation.history_views import STEP_VIEWS, histories_of
from tests.fakes.datasets import rows_of, simulated_dataset

HOUR_MS = 3_600_000


def by_hand() -> Dataset:
    """Two accounts: 0 pays at merchants 0, 1, 0 an hour apart; 1 pays once, a fraud, at 0."""
    start = 1_700_000_000_000
    return Dataset(
        np.array([0, 1, 0, 0], np.int32),
        np.array([0, 0, 1, 0], np.int32),
        np.array([1.0, 5.0, 2.0, 3.5]),
        start + HOUR_MS * np.array([0, 0, 1, 2]),
        np.array([0, 1, 0, 0], np.int8),
        np.array([0, 1, 0, 0], np.int8),
    )


def test_views_say_what_happened() -> None:
    histories = histories_of(by_hand())
    column = {name: histories.steps[:, at] for at, name in enumerate(STEP_VIEWS)}

    assert histories.length.tolist() == [3, 1]
    assert column["seen"].tolist() == [0, 0, 1, 0]
    assert np.expm1(column["since_visit"][2]) == pytest.approx(2)
    assert column["fraud"].tolist() == [0, 0, 0, 1]
    assert column["cents"].tolist() == [0, 0, 1, 0]
    assert histories.gap_hours[1:3].tolist() == [1, 1]
    assert np.isnan(histories.gap_hours[[0, 3]]).all()


def test_quantities_count_visits_frauds_and_runs() -> None:
    found = quantities(histories_of(by_hand()))

    assert found["merchants an account"].tolist() == [2, 1]
    assert found["accounts a merchant"].tolist() == [2, 1]
    assert found["frauds an account"].tolist() == [0, 1]
    assert found["run of frauds"].tolist() == [1]
    assert found["repeat visits"].tolist() == [0, 0, 1, 0]


def test_a_log_has_no_distance_to_itself_and_some_to_another() -> None:
    log = simulated_dataset(80, 200, 30)
    other = rows_of(log, np.flatnonzero(log.amount < 50))
    same = distances(histories_of(log), histories_of(log))
    changed = distances(histories_of(log), histories_of(other))

    assert set(same.values()) == {0.0}
    assert changed["amount"] > 0.2


def test_copies_of_members_are_recognised() -> None:
    log = simulated_dataset(160, 300, 30)
    first = histories_of(rows_of(log, np.flatnonzero(log.account % 2 == 0)))
    second = histories_of(rows_of(log, np.flatnonzero(log.account % 2 == 1)))
    found = privacy(first, second, first)

    assert found["closest_real"] < 1e-5
    assert found["membership_auc"] > 0.95


def test_windows_cover_short_and_long_histories() -> None:
    histories = histories_of(simulated_dataset(40, 100, 60))
    windows = windows_of(histories)

    assert set(windows.account) == set(range(histories.accounts))
    assert windows.length.max() == WINDOW_STEPS
    assert (windows.length >= 1).all()
