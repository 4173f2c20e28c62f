"""Reading of a worker's /metrics: samples, histogram buckets, quantiles."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

LATENCY = "recur_score_latency_seconds"
PARTITIONS = "recur_partitions_assigned"
TRANSACTIONS = "recur_transactions_total"

Samples = dict[str, float]
"""Sample name with labels, as /metrics prints it, to its value."""


def parse_samples(text: str) -> Samples:
    r"""Read the samples of a /metrics page.

    >>> parse_samples('# TYPE a counter\na_total 3.0\nb{le="+Inf"} 2.0\n')
    {'a_total': 3.0, 'b{le="+Inf"}': 2.0}
    """
    return {
        _printed_name(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def buckets(samples: Samples, name: str) -> dict[float, float]:
    """Collect the cumulative counts of a histogram without other labels, by upper bound."""
    start = f'{name}_bucket{{le="'
    return {
        float(key.removeprefix(start).removesuffix('"}')): value
        for key, value in samples.items()
        if key.startswith(start)
    }


def quantile(cumulative: Mapping[float, float], share: float) -> float | None:
    """Estimate a quantile of a histogram; None if it has no observations.

    Between two bounds the value is interpolated, as Prometheus does. Above the last finite bound
    it is that bound.

    >>> quantile({0.001: 10, 0.002: 30, float("inf"): 30}, 0.5)
    0.00125
    """
    total = cumulative.get(float("inf"), 0.0)
    if total <= 0:
        return None
    rank = share * total
    below_bound, below_count = 0.0, 0.0
    for bound in sorted(cumulative):
        count = cumulative[bound]
        if count >= rank:
            if bound == float("inf"):
                return below_bound
            inside = (rank - below_count) / (count - below_count) if count > below_count else 1.0
            return below_bound + (bound - below_bound) * inside
        below_bound, below_count = bound, count
    return below_bound


def _printed_name(name: str, labels: Mapping[str, str]) -> str:
    printed = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{printed}}}" if printed else name
