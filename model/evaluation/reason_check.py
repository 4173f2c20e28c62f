"""Whether the reasons of alerts name what made the fraud, where that is known."""

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
    """Share of the caught frauds of each scenario whose first reason is that of the scenario.

    Memory: the raw features of the whole log.

    Args:
        raw_of: gives the raw features [m, R] of rows [m] of the log, as the checkpoint sees it.
        scores: of the fold's tested rows.
        false_positive_rate: caught is what scores at least the threshold of this rate.

    Returns:
        by scenario; nothing where the data's scenarios have no known reason.
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
