"""The parts of the benchmark that run without services."""

from __future__ import annotations

from benchmarks.bench import accounts_only
from model.features.account import ACCOUNT_FEATURES
from pipeline.checkpoint import load_checkpoint
from pipeline.settings import load_settings


def test_the_network_of_accounts_alone_sees_no_merchant() -> None:
    shipped = load_checkpoint(load_settings())

    alone = accounts_only(shipped)

    features = alone.header.features
    assert {item.feature for item in features.inputs} <= set(ACCOUNT_FEATURES)
    assert alone.network.architecture.inputs == len(features.inputs)
    assert alone.network.architecture.hidden_size == shipped.network.architecture.hidden_size
