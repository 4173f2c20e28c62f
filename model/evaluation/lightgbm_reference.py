"""The outside reference: gradient boosting on the exact windows of the Handbook.

LightGBM is a requirement of the extra ``evaluate`` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.features.account import Float32

TREES = 300
PARAMETERS: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "max_delta_step": 1.0,  # with rare and obvious fraud, leaf values would grow without bound
    "deterministic": True,
    "num_threads": 1,  # several threads wait for the slowest one on a busy machine
    "verbosity": -1,
}


class MissingRequirementError(RuntimeError):
    """An optional requirement is not installed; the message says how to install it."""


def lightgbm() -> ModuleType:
    """Return the module LightGBM.

    Raises:
        MissingRequirementError: it is not installed, or its library cannot be loaded.
    """
    try:
        import lightgbm as module
    except (ImportError, OSError) as error:
        raise MissingRequirementError(
            f"LightGBM cannot be loaded ({error}): install the extra that it belongs to, "
            "pip install 'recur[evaluate]', or leave lightgbm out of --networks"
        ) from error
    found: ModuleType = module
    return found


class BoostedTrees:
    """Trained trees that score single transactions."""

    def __init__(self, booster: Any) -> None:
        self._booster = booster

    @property
    def parameters(self) -> int:
        """Number of leaves, split features and split thresholds of all trees."""
        tables = self._booster.dump_model()["tree_info"]
        leaves = sum(int(table["num_leaves"]) for table in tables)
        return leaves + 2 * (leaves - len(tables))

    def score(self, inputs: Float32) -> Float32:
        """Score inputs [n, I] on one core."""
        scores = self._booster.predict(inputs, num_threads=1)
        return np.asarray(scores, np.float32)


def fit_boosted(
    inputs: Float32,
    is_fraud: NDArray[np.bool_],
    seed: int,
    report: Callable[[float, str], None] = lambda done, note: None,
    trees: int = TREES,
    categories: Sequence[int] = (),
) -> tuple[BoostedTrees, float]:
    """Train trees on inputs [n, I]; return them and the seconds that it took.

    Args:
        inputs: [n, I].
        is_fraud: [n].
        seed: seed of LightGBM.
        report: called after each tree with the share done and an empty note.
        trees: number of trees.
        categories: columns of ``inputs`` that hold codes of categories.

    Raises:
        MissingRequirementError: LightGBM is not installed.
    """
    module = lightgbm()
    began = time.perf_counter()
    booster = module.train(
        PARAMETERS | {"seed": seed},
        module.Dataset(inputs, is_fraud.astype(np.float32), categorical_feature=list(categories)),
        trees,
        callbacks=[lambda state: report((state.iteration + 1) / trees, "")],
    )
    return BoostedTrees(booster), time.perf_counter() - began
