"""The check of alert reasons against the known causes of fraud."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.data.dataset import Dataset
from model.evaluation.protocol import Fold
from model.features.account import Float32
from model.metrics import threshold_at_false_positive_rate
from model.reasons import SCENARIO_REASONS, explain_log, reason_agreement


def first_reasons_agree(
    checkpoint: Checkpoint,
    log: Dataset,
    raw_of: Callable[[NDArray[np.intp]], Float32],
    fold: Fold,
    scores: Float32,
    false_positive_rate: float,
) -> dict[int, float]:
    """Return the share of caught frauds whose first reason is that of their scenario.

    Memory: the raw features of the whole log.

    Args:
        checkpoint: the model.
        log: the transactions.
        raw_of: gives the raw features [m, R] of rows [m] of the log for this checkpoint.
        fold: its test is checked.
        scores: scores of the tested rows.
        false_positive_rate: rate of the threshold from which a fraud counts as caught.

    Returns:
        Shares by scenario; only scenarios with a known reason.
    """
    rows = fold.tested_rows(log)
    threshold = threshold_at_false_positive_rate(scores, log.is_fraud[rows], false_positive_rate)
    caught = rows[(scores >= threshold) & np.isin(log.scenario[rows], list(SCENARIO_REASONS))]
    if not len(caught):
        return {}
    end = fold.end_row(log)
    chosen = np.zeros(end, np.bool_)
    chosen[caught] = True
    account = log.account[:end].astype(np.int64)
    reasons = explain_log(checkpoint, account, raw_of(np.arange(end)), chosen)
    return reason_agreement([first.code for first, *_ in reasons], log.scenario[caught])
