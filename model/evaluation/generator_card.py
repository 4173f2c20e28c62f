"""The card and the plots of a generator's evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.evaluation.generator_comparison import GENERATED, REAL, GeneratorResults
from model.evaluation.history_distances import MEASURES, quantities
from model.evaluation.history_views import Histories

TITLES = {
    "real": "real accounts (A)",
    "generator": "generated",
    "copies": "copies of A",
    "peer": "the peer",
}
PLOTTED = ("amount", "gap", "hour", "merchants an account", "frauds an account", "repeat visits")
BINS = 50


def rows_of(results: GeneratorResults) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of sources."""
    headings = [
        *("histories", "AUC GRU", "AUC LightGBM", "AP trained on it", "closest real"),
        *("closest held-out", "membership AUC", "by likelihood"),
    ]
    rows = []
    for found in results.sources:
        private = found.privacy
        rows.append(
            [
                TITLES[found.source],
                _number(found.auc_gru),
                _number(found.auc_lightgbm),
                _number(found.average_precision),
                *(
                    _number(private.get(name))
                    for name in (
                        *("closest_real", "closest_held_out", "membership_auc"),
                        "likelihood_auc",
                    )
                ),
            ]
        )
    return headings, rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def generator_card(results: GeneratorResults, plots: list[str]) -> str:
    """Return the card in Markdown."""
    headings, rows = rows_of(results)
    training = results.generator
    lines = [
        "# Generator card",
        "",
        f"Data: {results.data}; {results.accounts:,} accounts train the generator (A), as many"
        f" others are compared with (B), over {results.days} days; seed {results.seed}.",
        f"Generator: GRU of {training['hidden_size']}, {training['epochs']} epochs,"
        f" {training['transactions']:,} transactions.",
        "",
        *_markdown(headings, rows),
        "",
        "An AUC of .5 means that a discriminator cannot tell the histories from those of B."
        " The real accounts are the floor of the AUC. Copies protect nobody. Membership is guessed"
        " by the distance to the closest generated account, and by the likelihood under the file.",
    ]
    real, made = results.of(REAL), results.of(GENERATED)
    if real and made and real.average_precision and made.average_precision is not None:
        ratio = made.average_precision / real.average_precision
        lines += [
            "",
            f"Train on synthetic, test on real: {ratio:.1%} of the average precision of real"
            f" histories ({results.detector}).",
        ]
    lines += ["", "## Distances", "", "Kolmogorov and Smirnov's, to accounts B.", ""]
    sources = results.sources
    lines += _markdown(
        ["quantity", *(TITLES[found.source] for found in sources)],
        [[name, *(_number(found.distances.get(name)) for found in sources)] for name in MEASURES],
    )
    if made:
        lines += ["", f"LightGBM looks first at: {', '.join(made.telling)}."]
    lines += [f"\n![{name}]({name})" for name in plots]
    return "\n".join([*lines, ""])


def _markdown(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def plot_histories(views: dict[str, Histories], path: Path) -> None:
    """Plot the distributions of real and generated histories."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    shown = {"held out": "real (B)", GENERATED: "generated"}
    values = {name: quantities(views[name]) for name in shown}
    for place, quantity in enumerate(PLOTTED):
        both = np.concatenate([values[name][quantity] for name in shown])
        low, high = np.quantile(both, [0, 0.995])
        edges = np.linspace(low, max(high, low + 1), BINS)
        for name, title in shown.items():
            axes[place].hist(
                values[name][quantity], edges, density=True, histtype="step", label=title
            )
        axes[place].set_title(quantity, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, format="png", metadata={"Software": ""})
