"""A small generator, trained once for a process of tests."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np

from model.data.dataset import Dataset
from model.generator.generator import Generator
from model.generator.settings import GeneratorSettings
from model.generator.train import train_generator
from tests.fakes.datasets import simulated_dataset


@cache
def log_with_fields() -> Dataset:
    """Simulate a log with a field of the merchant, one of the account and one of the payment."""
    log = simulated_dataset(120, 240, 40)
    rng = np.random.default_rng(0)
    return dataclasses.replace(
        log,
        numeric={"age": (20 + log.account % 50).astype(np.float32)},
        categorical={
            "category": (log.merchant % 4).astype(np.int32),
            "channel": (rng.random(len(log)) < 0.3).astype(np.int32),
        },
        texts={"category": ["a", "b", "c", "d"], "channel": ["chip", "online"]},
    )


@cache
def small_generator() -> Generator:
    """Train a generator for a second or two."""
    settings = GeneratorSettings(hidden_size=12, head_size=12, epochs=1)
    return train_generator(log_with_fields(), settings)
