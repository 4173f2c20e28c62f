"""The results of a comparison, for the table, results.json and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from model.data.dataset import Dataset
from model.evaluation.candidates import BATCH_TRANSACTIONS
from model.evaluation.comparison import (
    DESCRIBED,
    GIVEN,
    TITLES,
    Comparison,
    ComparisonSettings,
)
from model.evaluation.forecast_report import ForecastResults
from model.evaluation.protocol import ProtocolName, days_of, iso_date
from model.evaluation.robustness import Robustness
from model.evaluation.run_cache import Run

RESULTS_FORMAT = 1

MEASURES: dict[str, str] = {
    "auc_roc": "AUC",
    "average_precision": "AP",
    "card_precision_at_100": "card P@100",
    "precision_at_100": "P@100",
    "recall_at_fpr_0.001": "R@0.1 %",
    "recall_at_fpr_0.01": "R@1 %",
    "calibration_error": "ECE",
    "brier_score": "Brier",
}
"""Measures by name, with the heading of their column."""

ACCOUNT_HEAD_TITLE = "  its account head"
"""Row of the account head, which scores whether the account is compromised."""

FINE = ("calibration_error", "brier_score")
"""Measures with small values, where smaller is better."""

PUBLISHED: dict[ProtocolName, dict[str, dict[str, float]]] = {
    "handbook": {
        "published best (the Handbook, on its data)": {
            "auc_roc": 0.880,
            "average_precision": 0.687,
            "card_precision_at_100": 0.305,
        }
    },
    "split": {},
}
"""Published figures of the Fraud Detection Handbook, by its own protocol on its own data."""


class NetworkSummary(msgspec.Struct, frozen=True, kw_only=True):
    """NetworkSummary of a network over all folds and seeds.

    Attributes:
        mean: mean of each measure.
        deviation: deviation over seeds of each measure's mean over folds; empty for one seed.
        seconds: mean time of a training.
        microseconds: see :class:`model.evaluation.run_cache.Run`.
        recall_by_scenario: mean over folds and seeds.
        account_head: measures of the account head, mean of the runs; only of a GRU.
    """

    network: str
    title: str
    runs: int
    mean: dict[str, float]
    deviation: dict[str, float] = {}
    seconds: float = 0.0
    parameters: int = 0
    microseconds: float = 0.0
    recall_by_scenario: dict[int, float] = {}
    account_head: dict[str, float] = {}


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a comparison.

    Attributes:
        protocol: name of the protocol.
        folds: folds in words, by name.
        data: description of the data.
        published: published figures by title.
        robustness: None if it was not measured.
        first_reasons_agree: share of the described model's caught frauds whose first reason is
            the true one, by scenario.
        cautions: reasons to trust a figure less.
        tested: number of transactions and frauds in all tests.
        forecast: comparison of forecasts; None if it was not measured.
    """

    format_version: int = RESULTS_FORMAT
    protocol: ProtocolName
    folds: dict[str, str]
    data: dict[str, Any]
    tested: dict[str, int]
    settings: dict[str, Any]
    networks: list[NetworkSummary]
    published: dict[str, dict[str, float]]
    runs: list[Run]
    robustness: Robustness | None = None
    first_reasons_agree: dict[int, float] = {}
    cautions: list[str] = []
    batch_transactions: int = BATCH_TRANSACTIONS
    forecast: ForecastResults | None = None


def results_of(
    comparison: Comparison,
    log: Dataset,
    settings: ComparisonSettings,
    source: str,
    robustness: Robustness | None = None,
    first_reasons_agree: dict[int, float] | None = None,
) -> Results:
    """Collect the results of a comparison.

    Args:
        comparison: the runs.
        log: the transactions.
        settings: the settings of the comparison.
        source: the origin of the log, in a few words.
        robustness: results of :func:`model.evaluation.robustness.measure_robustness`.
        first_reasons_agree: results of :mod:`model.evaluation.reason_check`.
    """
    first, last = days_of(log)[[0, -1]].tolist()
    rows = np.concatenate(list(comparison.rows.values()))
    return Results(
        protocol=comparison.protocol,
        folds={fold.name: fold.describe() for fold in comparison.folds},
        data={
            "source": source,
            "digest": log.digest(),
            "transactions": len(log),
            "frauds": int(log.is_fraud.sum()),
            "accounts": len(np.unique(log.account)),
            "merchants": len(np.unique(log.merchant)),
            "first_day": iso_date(first),
            "last_day": iso_date(last),
        },
        tested={"transactions": len(rows), "frauds": int(log.is_fraud[rows].sum())},
        settings=msgspec.to_builtins(settings),
        networks=[summarise(name, comparison.of(name)) for name in comparison.networks()],
        published=PUBLISHED[comparison.protocol],
        runs=comparison.runs,
        robustness=robustness,
        first_reasons_agree=first_reasons_agree or {},
        cautions=cautions(comparison, log),
    )


def cautions(comparison: Comparison, log: Dataset) -> list[str]:
    """Return a caution for each fold whose test the given checkpoint may have learned from."""
    found = []
    for fold in comparison.folds:
        checkpoint = comparison.checkpoints.get(fold.name)
        if checkpoint is None or GIVEN not in comparison.networks():
            continue
        header = checkpoint.header
        until = str(header.training.get("train_until") or "")[:10]
        if header.data_digest == log.digest() and (not until or until > iso_date(fold.test_from)):
            found.append(
                f"{fold.name}: the checkpoint was trained on these data "
                f"{f'up to {until}' if until else 'without a last day'}, so that days of the test "
                "may be among those that it learned from"
            )
    return found


def summarise(network: str, runs: Sequence[Run]) -> NetworkSummary:
    """Summarise the runs of a network."""
    seeds = sorted({run.seed for run in runs})
    mean, deviation = {}, {}
    for measure in MEASURES:
        of_seed = [
            np.mean([run.metrics[measure] for run in runs if run.seed == seed]) for seed in seeds
        ]
        mean[measure] = float(np.mean(of_seed))
        if len(seeds) > 1:
            deviation[measure] = float(np.std(of_seed, ddof=1))
    scenarios = sorted({s for run in runs for s in run.recall_by_scenario})
    return NetworkSummary(
        network=network,
        title=TITLES[network],
        runs=len(runs),
        mean=mean,
        deviation=deviation,
        seconds=float(np.mean([run.seconds for run in runs])),
        parameters=runs[0].parameters,
        microseconds=min(run.microseconds for run in runs),
        recall_by_scenario={
            s: float(np.mean([r.recall_by_scenario[s] for r in runs if s in r.recall_by_scenario]))
            for s in scenarios
        },
        account_head=_account_head(runs),
    )


def _account_head(runs: Sequence[Run]) -> dict[str, float]:
    measured = [run.account_head for run in runs if run.account_head]
    if not measured:
        return {}
    return {name: float(np.mean([m[name] for m in measured])) for name in MEASURES}


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table: a row for each network, then published figures."""
    headings = ["network", *MEASURES.values(), "train s", "parameters", "µs/tx"]
    rows = []
    for network in results.networks:
        measures = [
            in_figures(name, network.mean[name], network.deviation.get(name)) for name in MEASURES
        ]
        trained = f"{network.seconds:,.0f}" if network.seconds else "–"
        rows.append(
            [
                network.title,
                *measures,
                trained,
                f"{network.parameters:,}",
                f"{network.microseconds:.2f}",
            ]
        )
        if network.network in (GIVEN, DESCRIBED) and network.account_head:
            measures = [in_figures(name, network.account_head[name]) for name in MEASURES]
            rows.append([ACCOUNT_HEAD_TITLE, *measures, "–", "–", "–"])
    for title, published in results.published.items():
        found = [in_figures(n, published[n]) if n in published else "–" for n in MEASURES]
        rows.append([title, *found, "–", "–", "–"])
    return headings, rows


def in_figures(measure: str, value: float, deviation: float | None = None) -> str:
    """Format a measure for tables.

    >>> in_figures("average_precision", 0.78642), in_figures("brier_score", 0.003141)
    ('.786', '.00314')
    >>> in_figures("average_precision", 0.78642, 0.0021), in_figures("auc_roc", 1.0)
    ('.786 ±.002', '1.000')
    """
    digits = 5 if measure in FINE else 3
    text = f"{value:.{digits}f}".removeprefix("0")
    if deviation is None or measure != "average_precision":
        return text
    return f"{text} ±{f'{deviation:.{digits}f}'.removeprefix('0')}"
