"""The plot of a probe as a PNG file: scores by sweep, and exposure by false positives.

matplotlib is a requirement of the extra ``evaluate`` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.probe.exposure import TARGET_TIMES_USUAL
from model.probe.sweeps import AMOUNT_SWEEP, Curve, ProbeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 110
PANEL_INCHES = (5.6, 4.2)
COLUMNS = 3
_LINEAR = {"hour of the day", "weekday"}
_SCORE_LEAST = 1e-6


def plot_probe(result: ProbeResult, path: Path) -> None:
    """Write the plot; matplotlib must be installed."""
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(curve.sweep for curve in result.curves))
    sweeps.sort(key=lambda sweep: sweep != AMOUNT_SWEEP)
    panels = len(sweeps) + 1
    rows = -(-panels // COLUMNS)
    # Fixed margins, because computing them takes longer than everything else.
    figure = Figure(figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows), dpi=DOTS_PER_INCH)
    figure.subplots_adjust(
        left=0.05, right=0.985, top=1 - 0.18 / rows, bottom=0.36 / rows, hspace=0.32, wspace=0.17
    )
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    names = list(dict.fromkeys(curve.history for curve in result.curves))
    for sweep, panel in zip(sweeps, axes, strict=False):
        _sweep(panel, sweep, [c for c in result.curves if c.sweep == sweep], names, result.review)
    _exposure(axes[len(sweeps)], result)
    for panel in axes[panels:]:
        panel.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9)
    figure.suptitle(f"recur probe ({result.form}): model {result.model}")
    figure.savefig(path, format="png", metadata={"Software": ""})


def _sweep(axes: Axes, sweep: str, curves: list[Curve], names: list[str], review: float) -> None:
    for curve in curves:
        scores = [max(score, _SCORE_LEAST) for score in curve.scores]
        number = names.index(curve.history)
        axes.plot(curve.values, scores, color=f"C{number % 10}", linewidth=1.3, label=curve.history)
    axes.axhline(review, color="black", linewidth=0.8, linestyle=":")
    if sweep not in _LINEAR:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(min(curves[0].values), max(curves[0].values))
    axes.set_yscale("log")
    axes.set_ylim(_SCORE_LEAST / 2, 1.5)
    axes.minorticks_off()
    axes.set_xlabel(sweep)
    axes.set_title(curves[0].context, fontsize=9)
    axes.set_ylabel("score")
    axes.grid(alpha=0.3)


def _exposure(axes: Axes, result: ProbeResult) -> None:
    points = sorted(result.exposure.curve, key=lambda point: point.false_positive_rate)
    rates = [100 * point.false_positive_rate for point in points]
    for name, style in (("day", "-"), ("week", "--")):
        for measure, colour in (("median", "#0072B2"), ("p99", "#D55E00")):
            taken = [max(getattr(getattr(point, name), measure), 1e-2) for point in points]
            title = f"{name}, {'median' if measure == 'median' else '99th percentile'}"
            axes.plot(rates, taken, style, color=colour, marker="o", markersize=3, label=title)
    axes.axhline(TARGET_TIMES_USUAL, color="black", linewidth=0.8, linestyle=":")
    if rates:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    axes.set_xlabel("false positives, % of legitimate payments")
    axes.set_ylabel("exposure / usual spending")
    axes.grid(alpha=0.3)
