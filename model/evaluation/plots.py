"""Plots of a comparison as PNG files: precision and recall, and calibration.

matplotlib is a requirement of the extra ``evaluate`` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.evaluation.comparison import REFERENCE, TITLES, Comparison
from model.evaluation.lightgbm_reference import MissingRequirementError
from model.features.account import Float32
from model.metrics import Scores, average_precision, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (8.0, 7.0)
DOTS_PER_INCH = 120
POINTS_MAX = 2000
"""Most points of a curve; more would not be visible."""

# Colours of Okabe and Ito, which colour-blind people can distinguish.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#888888"),
    "#000000",
)


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        MissingRequirementError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - only to see whether it is installed
    except ImportError as error:
        raise MissingRequirementError(
            f"matplotlib cannot be loaded ({error}): install the extra that it belongs to, "
            "pip install 'recur[evaluate]', or leave the plots out with --no-plots"
        ) from error


def plot_precision_recall(comparison: Comparison, log: Dataset, path: Path) -> None:
    """Plot precision by recall of each network, for all folds and the first seed."""
    figure, axes = _figure("recall: share of fraud found", "precision: share of fraud in alerts")
    for network, colour in _coloured(comparison):
        scores, is_fraud = _pooled(comparison, log, network)
        recall, precision = precision_recall_curve(scores, is_fraud)
        ap = average_precision(scores, is_fraud)
        axes.plot(
            recall,
            precision,
            color=colour,
            linestyle="--" if network == REFERENCE else "-",
            linewidth=1.6,
            label=f"{TITLES[network]} (AP {ap:.3f})",
        )
    share = _pooled(comparison, log, comparison.networks()[0])[1].mean()
    axes.axhline(share, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(f"chance: {share:.2%} is fraud", (0.99, share + 0.01), fontsize=8, ha="right")
    axes.set_title(_title(comparison))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    _save(figure, path)


def plot_calibration(comparison: Comparison, log: Dataset, path: Path) -> None:
    """Plot the share of fraud by score of each network, in 15 bins.

    The area of a bin grows with its transactions.
    """
    figure, axes = _figure("mean score of a bin", "share of fraud in the bin")
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="calibrated")
    for network, colour in _coloured(comparison):
        bins = reliability(*_pooled(comparison, log, network))
        error = np.abs(bins.mean_score - bins.fraud_share) @ bins.count / bins.count.sum()
        axes.plot(
            bins.mean_score,
            bins.fraud_share,
            color=colour,
            linestyle="--" if network == REFERENCE else "-",
            linewidth=1.2,
            label=f"{TITLES[network]} (ECE {error:.4f})",
        )
        axes.scatter(
            bins.mean_score, bins.fraud_share, s=8 * np.log10(bins.count + 1), color=colour
        )
    axes.set_title(_title(comparison))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    _save(figure, path)


def precision_recall_curve(
    scores: Scores, is_fraud: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return recall and precision at thresholds from the highest score to the lowest.

    There are at most about :data:`POINTS_MAX` points, evenly spaced in recall.

    >>> precision_recall_curve(np.array([.9, .8, .8], np.float32), np.array([True, False, True]))
    (array([0.5, 1. ]), array([1.        , 0.66666667]))
    """
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    found = np.cumsum(is_fraud[order])[last_of_tie]
    recall, precision = found / is_fraud.sum(), found / (last_of_tie + 1)
    some = np.unique(np.searchsorted(recall, np.linspace(0, 1, POINTS_MAX)))
    some = np.minimum(some, len(recall) - 1)
    return recall[some], precision[some]


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": ""})


def _coloured(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the networks that ran, each with its colour, which is the same in all plots."""
    names = list(TITLES)
    return [(n, _COLOURS[names.index(n) % len(_COLOURS)]) for n in comparison.networks()]


def _title(comparison: Comparison) -> str:
    if len(comparison.folds) == 1:
        return comparison.folds[0].describe()
    return f"{len(comparison.folds)} folds of the protocol {comparison.protocol}, together"


def _pooled(
    comparison: Comparison, log: Dataset, network: str
) -> tuple[Float32, NDArray[np.bool_]]:
    """Return scores and truth of all folds, one after the other, for the first seed."""
    seed = min(run.seed for run in comparison.of(network))
    names = [fold.name for fold in comparison.folds]
    return (
        np.concatenate([comparison.scores[network, name, seed] for name in names]),
        np.concatenate([log.is_fraud[comparison.rows[name]] for name in names]),
    )
