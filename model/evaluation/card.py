"""The model card: a model's description, data, performance and limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from model.checkpoint import Checkpoint
from model.evaluation.comparison import GIVEN, RECALL_FALSE_POSITIVE_RATE
from model.evaluation.forecast_report import following_table, forecast_table
from model.evaluation.protocol import HANDBOOK_FOLDS
from model.evaluation.results import NetworkSummary, Results, table
from model.features.spec import FeatureSpec
from model.reasons import SCENARIO_REASONS
from model.simulator.world import scenario_name
from model.training.account_head import COMPROMISED_DAYS, EVERY

MEANINGS = {
    "AUC": "probability that a fraud scores higher than a legitimate transaction",
    "AP": "average precision, the area under the precision-recall curve",
    "card P@100": (
        "each day the 100 cards of highest score: share that has a fraud that day; a card found "
        "leaves the days after (the Handbook's definition)"
    ),
    "P@100": "each day the 100 transactions of highest score: share of fraud",
    "R@0.1 %": "share of fraud found where 0.1 % of legitimate transactions raise an alert",
    "R@1 %": "the same at 1 %",
    "ECE": "expected calibration error, 15 bins of equal width",
    "Brier": "mean squared difference of score and truth",
    "µs/tx": (
        "microseconds for a transaction in batches of {batch} on one core, of the network alone: "
        "features, Kafka and Redis come on top"
    ),
}


def model_card(results: Results, checkpoint: Checkpoint | None, plots: Sequence[str] = ()) -> str:
    """Write the card in Markdown.

    Args:
        results: the results of a comparison.
        checkpoint: the model of the card. None: the card covers the comparison only.
        plots: names of the image files beside the card.
    """
    described = _described(results, checkpoint)
    metrics = checkpoint.header.metrics if checkpoint else {}
    sections = [
        _head(checkpoint),
        *([_model(checkpoint), _inputs(checkpoint.header.features)] if checkpoint else []),
        _data(results, checkpoint),
        _protocol(results),
        _comparison(results, plots),
        _scenarios(results),
        *([_reasons(results)] if results.first_reasons_agree else []),
        *([_forecast(results)] if results.forecast else []),
        *([_robustness(results)] if results.robustness else []),
        *([_thresholds(checkpoint)] if checkpoint else []),
        *([_behaviour(checkpoint)] if checkpoint and "probe_violations" in metrics else []),
        _limits(results, described),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _described(results: Results, checkpoint: Checkpoint | None) -> NetworkSummary:
    """Return the network of the card, or the best one."""
    by_name = {network.network: network for network in results.networks}
    for name in (GIVEN, "gru"):
        if checkpoint is not None and name in by_name:
            return by_name[name]
    return max(results.networks, key=lambda n: n.mean["average_precision"])


def _head(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "# Comparison of networks"
    return f"# Model card: Recur {checkpoint.digest}"


def _model(checkpoint: Checkpoint) -> str:
    a = checkpoint.header.architecture
    layers = "one layer" if a.layers == 1 else f"{a.layers} layers"
    return f"""## What it is

A recurrent network that gives each card transaction a probability of fraud, from the
transaction, the account's history and the merchant's recent past. An account's history is a
hidden state of {a.layers} x {a.hidden_size} numbers, which each of its transactions updates once.

{
        _markdown_table(
            ["", ""],
            [
                ["digest of weights, architecture and inputs", f"`{checkpoint.digest}`"],
                [
                    "network",
                    f"input layer of {a.input_size}, GRU of {a.hidden_size} in {layers}, "
                    f"head of {a.head_size}",
                ],
                ["inputs", str(len(checkpoint.header.features.inputs))],
                [
                    "parameters",
                    f"{sum(w.numel() for w in checkpoint.network.parameters()):,}",
                ],
                ["currency of amounts", checkpoint.header.currency],
                ["a label takes", f"{checkpoint.header.features.label_delay_days:g} days"],
            ],
        )
    }

Intended use: ranking the payments of a stream for review, and declining the worst of them. Not
intended: decisions about people, or about anything other than single payments."""


def _inputs(spec: FeatureSpec) -> str:
    rows = []
    by_feature = sorted(spec.inputs, key=lambda i: spec.names.index(i.feature))
    for feature, group in groupby(by_feature, key=lambda i: i.feature):
        seen = [f"step at {i.threshold:g}" if i.transform == "step" else i.transform for i in group]
        rows.append([f"`{feature}`", ", ".join(seen)])
    return f"""## Inputs

Training and worker compute them by the same code (`model/features`). The model sees only closed
time buckets of a merchant, and the labels that arrived in them, so nothing looks ahead.

{_markdown_table(["feature", "as"], rows)}"""


def _data(results: Results, checkpoint: Checkpoint | None) -> str:
    data = results.data
    text = f"""## Data

Measured on {data["source"]}: {data["transactions"]:,} transactions, {data["frauds"]:,} of them
fraud ({data["frauds"] / data["transactions"]:.2%}), {data["accounts"]:,} accounts,
{data["merchants"]:,} merchants, {data["first_day"]} to {data["last_day"]}; digest
`{data["digest"]}`."""
    if checkpoint is None:
        return text
    if results.cautions:
        text += "\n\n" + "\n".join(f"- Caution: {caution}." for caution in results.cautions)
    digest = checkpoint.header.data_digest
    if digest == data["digest"] and not results.cautions:
        return text + "\n\nThe model was trained on the training days of the protocol."
    rows = [[f"`{name}`", str(value)] for name, value in sorted(checkpoint.header.training.items())]
    return f"""{text}

The model was trained on other data, or on the same data read in another way: digest
`{digest or "unknown"}`. The digest does not show whether they include days of the test.

{_markdown_table(["training", ""], rows) if rows else ""}"""


def _protocol(results: Results) -> str:
    lines = [f"- {name}: {text}" for name, text in results.folds.items()]
    rule = (
        "Each network learns from all days up to the end of a fold's training, minus a warm-up. It "
        "is measured on the fold's test. The days between them are the label delay."
    )
    if results.protocol == "handbook":
        rule = (
            "The protocol of the Fraud Detection Handbook (chapters 5 to 7): "
            f"{HANDBOOK_FOLDS} folds a week apart, with seven days each of training, delay and "
            "test. A card leaves the "
            f"test on the day its fraud becomes known. {rule}"
        )
    tested = results.tested
    return f"""## Protocol

{rule}

{chr(10).join(lines)}

Tested in all: {tested["transactions"]:,} transactions, {tested["frauds"]:,} of them fraud."""


def _comparison(results: Results, plots: Sequence[str]) -> str:
    headings, rows = table(results)
    account_head = (
        f"The account head scores the account's state after every {EVERY}th of its transactions: "
        f"did the account have a fraud within the last {COMPROMISED_DAYS} days?"
        if any(network.account_head for network in results.networks)
        else ""
    )
    meanings = [
        f"- {name}: {meaning.format(batch=results.batch_transactions)}"
        for name, meaning in MEANINGS.items()
    ]
    seeds = max(
        len({run.seed for run in results.runs if run.network == n.network})
        for n in results.networks
    )
    over = "" if seeds == 1 else f" Mean over {seeds} seeds; ± is their standard deviation."
    images = "\n\n".join(f"![{name}]({name})" for name in plots)
    return f"""## How good it is

{_markdown_table(headings, rows)}

{" ".join(text for text in (over.strip(), account_head) if text)}

{chr(10).join(meanings)}

{images}"""


def _scenarios(results: Results) -> str:
    numbers = sorted({s for network in results.networks for s in network.recall_by_scenario})
    headings = ["network", *(scenario_name(s) for s in numbers)]
    rows = [
        [n.title, *(_share(n.recall_by_scenario.get(s)) for s in numbers)] for n in results.networks
    ]
    return f"""## By kind of fraud

Share of each kind's transactions found where {RECALL_FALSE_POSITIVE_RATE:.1%} of the legitimate
ones raise an alert:

{_markdown_table(headings, rows)}"""


def _reasons(results: Results) -> str:
    rows = [
        [scenario_name(s), f"`{SCENARIO_REASONS[s]}`", _share(share)]
        for s, share in sorted(results.first_reasons_agree.items())
    ]
    return f"""## Reasons

Share of the frauds caught at that threshold whose first reason is the cause of the fraud:

{_markdown_table(["kind", "reason", "share"], rows)}"""


def _forecast(results: Results) -> str:
    found = results.forecast
    assert found is not None
    headings, rows = forecast_table(found)
    groups = [[name, f"{share:.1%}", f"{days:,}"] for name, (share, days) in found.groups.items()]
    return f"""## Forecasts

The next 30 days of {found.samples:,} accounts and moments of the test, {found.days:,} days in all:
mean pinball loss of a day's amount and of its number of payments over the levels 5, 10, 25, 50, 75,
90 and 95 %. `<10`: accounts with fewer than ten payments. Coverage: days in the 80 % interval of
the amount; a day without payment counts by the interval's share of its probability. Closed: days in
the closed interval.

{_markdown_table(headings, rows)}

{_markdown_table(["group", "coverage of 80 %", "days"], groups)}

Simulated accounts whose rate or level changes for good: share of the way that the forecast has
gone after some payments. Half way: the fewest of these payments with a half.

{_markdown_table(*following_table(found))}

Silent for a week: {found.silent[0]:.2%} forecast, {found.silent[1]:.2%} observed. Days with fraud:
{found.fraud[0]:.2%} forecast, {found.fraud[1]:.2%} observed."""


def _robustness(results: Results) -> str:
    found = results.robustness
    assert found is not None
    faults = [
        [cost.title, f"{cost.average_precision:.4f}", f"{cost.lost:+.5f}"] for cost in found.faults
    ]
    weeks = [
        [
            week.first_day,
            f"{week.frauds:,}",
            f"{week.with_states:.3f}",
            f"{week.states_lost:.3f}",
            f"{week.with_states - week.states_lost:+.3f}",
        ]
        for week in found.weeks
    ]
    return f"""## Robustness

Average precision of scoring step by step as a worker does is {found.average_precision:.4f} without
faults. Cost of each fault of the account states:

{_markdown_table(["fault", "AP", "AP lost"], faults)}

All account states lost at the start of the test, by week:

{_markdown_table(["week from", "frauds", "AP", "AP, states lost", "AP lost"], weeks)}"""


def _thresholds(checkpoint: Checkpoint) -> str:
    thresholds = checkpoint.header.thresholds
    return f"""## Thresholds

A transaction is reviewed at a score of {thresholds.review:.4g} or more, and declined at
{thresholds.decline:.4g} or more. `recur thresholds` sets both by a budget of alerts, a false
positive rate, a precision or costs."""


def _behaviour(checkpoint: Checkpoint) -> str:
    found = checkpoint.header.metrics
    rows = [
        [
            "curves in which more money over what is usual, or more known frauds, lower the score",
            f"{found['probe_violations']:,.0f}",
        ],
        [
            "large payments, over ten times what is usual, that are reviewed or declined",
            _share(found["probe_large_payments_caught"]),
        ],
    ]
    for span in ("day", "week"):
        median, p99 = (found.get(f"probe_exposure_{span}_{which}") for which in ("median", "p99"))
        if median is not None and p99 is not None:
            rows.append(
                [
                    f"the most that a thief takes in a {span} under the review threshold, as a "
                    "multiple of the account's usual spending: median, 99th percentile",
                    f"{median:,.3g}, {p99:,.3g}",
                ]
            )
    return f"""## Behaviour outside the data

Measured by the short form of `recur probe`. Multiples are lower bounds.

{_markdown_table(["what", "found"], rows)}"""


def _limits(results: Results, described: NetworkSummary) -> str:
    worst = min(described.recall_by_scenario.items(), key=lambda i: i[1], default=None)
    blind = ""
    if worst is not None:
        kind = scenario_name(worst[0])
        blind = (
            f"- It finds the smallest share of the kind “{kind}”: {worst[1]:.1%} at "
            f"{RECALL_FALSE_POSITIVE_RATE:.1%} false positives.\n"
        )
    return f"""## Limits

- Data like the Fraud Detection Handbook's are simulated. Real fraud is more varied and changes
  when it is found. Train and measure on your own transactions before you trust a score.
- Scores are probabilities only while the share and the kinds of fraud are those of the training
  (ECE {described.mean["calibration_error"]:.5f} here).
{blind}- A fraud at a merchant is unknown until its label arrives, some days later. Until then the
  score depends on the account's history alone.
- The first transactions of an account are scored without a history. After a loss of all states
  this holds for all accounts.
- It was not examined for differences between groups of people. It sees no attribute of a person,
  but amounts, times and merchants can be proxies for one."""


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += [
        "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines)
