"""The outside reference: gradient boosting on the handbook's exact windows.

LightGBM is not one of Recur's requirements, but of its extra ``evaluate``.
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
    "max_delta_step": 1.0,  # where fraud is rare and plain, leaves run away without a bound
    "deterministic": True,
    "num_threads": 1,  # of several each waits for the slowest, and they crawl on a busy machine
    "verbosity": -1,
}


class MissingRequirementError(RuntimeError):
    """An optional requirement is not installed; the message says how to install it."""


def lightgbm() -> ModuleType:
    """The module, if it is installed.

    Raises:
        MissingRequirementError: it is not, or its library cannot be loaded.
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
    """Trees that score transactions one by one."""

    def __init__(self, booster: Any) -> None:
        self._booster = booster

    @property
    def parameters(self) -> int:
        """Splits (a feature and a threshold each) and leaves of all trees."""
        tables = self._booster.dump_model()["tree_info"]
        leaves = sum(int(table["num_leaves"]) for table in tables)
        return leaves + 2 * (leaves - len(tables))

    def score(self, inputs: Float32) -> Float32:
        """Scores [n] of inputs [n, I], on one core."""
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
    """Trees trained on inputs [n, I], and the seconds that it took.

    Args:
        report: called after each tree with the share that is done and nothing to note.
        categories: columns of ``inputs`` whose numbers are codes.

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
