"""Data that a generator cannot learn from are refused with what is missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from model.data.dataset import UNKNOWN, Dataset
from model.generator.settings import GeneratorError, GeneratorSettings
from model.generator.train import accounts_of, check_data, sample_of
from tests.model.generator.small_generator import log_with_fields, small_generator


def _first_days(log: Dataset, days: int) -> Dataset:
    rows = int((log.day < days).sum())
    columns = {
        name: getattr(log, name)[:rows]
        for name in ("account", "merchant", "amount", "timestamp_ms", "label", "scenario")
    }
    return dataclasses.replace(log, **columns, numeric={}, categorical={})


def test_what_is_missing_is_named() -> None:
    log = log_with_fields()
    everywhere = np.zeros(len(log), np.int8)
    few = np.unique(log.account)[:40]
    cases = {
        "the data have 40 accounts; a generator needs 50": accounts_of(log, few),
        "all labels say legitimate": dataclasses.replace(log, label=everywhere),
        "all labels say fraud": dataclasses.replace(log, label=everywhere + 1),
        "no transaction has a label": dataclasses.replace(log, label=everywhere + UNKNOWN),
        "transactions; a generator needs 2,000": _first_days(log, 5),
    }
    for message, data in cases.items():
        with pytest.raises(GeneratorError, match=message):
            check_data(data)


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(GeneratorError, match="epochs is 0; it must be 1 to"):
        GeneratorSettings(epochs=0)


def test_of_more_transactions_than_the_limit_whole_accounts_are_drawn() -> None:
    log = log_with_fields()
    sample = sample_of(log, GeneratorSettings(transactions_max=3000))

    assert 2000 < len(sample) <= 3000
    assert set(np.bincount(sample.account)) <= set(np.bincount(log.account))


def test_the_losses_are_below_those_of_a_uniform_choice() -> None:
    losses = small_generator().header.training["losses"]

    assert losses["slot"] < np.log(48)
    assert losses["amount"] < np.log(small_generator().header.sizes.amounts) + 0.05
    assert losses["fields"] < np.log(3)
