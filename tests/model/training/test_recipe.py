"""The training recipe: the evaluation measures the network that the training ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint
from model.training import merchant_weight_fit
from model.training.settings import TrainingSettings
from model.training.train import train
from pipeline.cli.evaluate import EvaluateOptions, run_evaluate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SETTINGS: dict[str, Any] = {
    "world": "handbook",
    "customers": 150,
    "terminals": 200,
    "days": 50,
    "hidden_size": 8,
    "epochs": 2,
    "forecast": False,
    "device": "cpu",
}
TRAIN_UNTIL, TEST_FROM = "2018-04-28", "2018-05-05"


@pytest.mark.slow
def test_evaluation_measures_exactly_the_network_that_training_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merchant_weight_fit, "UPDATES", 200)  # enough to differ by seed
    periods: dict[str, Any] = {"train_until": TRAIN_UNTIL, "test_from": TEST_FROM}
    shipped = train(TrainingSettings(**SETTINGS, **periods, seed=1), tmp_path / "shipped")
    run_evaluate(
        EvaluateOptions(
            output=tmp_path / "evaluated",
            networks=("gru",),
            plots=False,
            robustness=False,
            forecast=False,
            training=SETTINGS,
            **periods,
        )
    )
    (path,) = (tmp_path / "evaluated" / "runs").glob("gru-split-1-*.safetensors")
    evaluated = Checkpoint.load(path)

    weights = evaluated.network.state_dict()
    for name, weight in shipped.network.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert evaluated.digest == shipped.digest
    assert evaluated.header.training != shipped.header.training  # each records how it was made
    assert evaluated.with_header(training={}).header == shipped.with_header(training={}).header
