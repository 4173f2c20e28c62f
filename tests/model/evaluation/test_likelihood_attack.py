"""The attack by likelihoods sees what the generator's file says about an account."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from model.data.dataset import Dataset
from model.evaluation.likelihood_attack import account_losses, likelihood_auc
from model.generator.train import accounts_of
from tests.model.generator.small_generator import log_with_fields, small_generator


def _real() -> Dataset:
    log = log_with_fields()
    return accounts_of(log, np.unique(log.account))


def test_the_weights_make_real_histories_more_likely() -> None:
    log, generator = _real(), small_generator()
    untrained = {name: np.zeros_like(weight) for name, weight in generator.weights.items()}

    learned = account_losses(generator, log)
    without = account_losses(dataclasses.replace(generator, weights=untrained), log)

    assert learned.shape == (len(np.unique(log.account)),)
    assert np.isfinite(learned).all()
    assert (learned < without).mean() > 0.75


def test_the_attack_finds_histories_that_are_less_likely() -> None:
    log, generator = _real(), small_generator()
    members = accounts_of(log, np.unique(log.account)[:60])
    others = accounts_of(log, np.unique(log.account)[60:])
    rng = np.random.default_rng(0)
    odd = dataclasses.replace(others, merchant=rng.permutation(others.merchant))

    assert likelihood_auc(generator, members, others) == pytest.approx(0.5, abs=0.2)
    assert likelihood_auc(generator, members, odd) > 0.9


def test_a_text_that_the_generator_does_not_know_is_missing() -> None:
    log, generator = _real(), small_generator()
    unknown = dataclasses.replace(log, texts={**log.texts, "channel": ["chip", "a new one"]})
    never_missing = {**generator.weights, "field_0.bias": np.array([0, 0, -20], np.float32)}
    generator = dataclasses.replace(generator, weights=never_missing)

    assert account_losses(generator, unknown).mean() > account_losses(generator, log).mean() + 3
