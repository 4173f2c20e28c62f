"""The comparison of networks on a few simulated transactions, also by the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from model.checkpoint import Checkpoint
from model.data.dataset import Dataset
from model.evaluation import lightgbm_reference as reference
from model.evaluation import plots
from model.evaluation.comparison import (
    KINDS,
    NETWORKS,
    Comparer,
    ComparisonError,
    ComparisonSettings,
)
from model.evaluation.lightgbm_reference import MissingRequirementError
from model.evaluation.plots import precision_recall_curve
from model.evaluation.protocol import split_fold
from model.evaluation.results import MEASURES, in_figures, summarise
from model.evaluation.run_cache import Run, RunCache
from model.features.spec import Field
from model.training.loop import RECIPE
from model.training.settings import Report, TrainingSettings
from pipeline.cli import main as cli
from pipeline.cli.evaluate import EvaluateOptions, run_evaluate
from pipeline.errors import RecurError
from tests.fakes.datasets import simulated_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_torch_thread", "few_updates_of_merchant_weight"),
]

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "epochs": 4,
    "accounts_per_batch": 16,
    "learning_rate": 1e-2,
    "device": "cpu",
}
SIMULATED = {"customers": 200, "terminals": 500, "days": 60}
SHORT = SIMULATED | {"customers": 50, "terminals": 100}


@pytest.fixture(scope="module")
def log() -> Dataset:
    return simulated_dataset(**SIMULATED)


@pytest.fixture(scope="module")
def short_log() -> Dataset:
    """Simulate few transactions, for tests that hold of any network."""
    return simulated_dataset(**SHORT)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Evaluate all networks once; return the output folder and results.json."""
    output = tmp_path_factory.mktemp("evaluated") / "new folder"
    run_evaluate(EvaluateOptions(output=output, training=SMALL | SIMULATED, trees=40))
    return output, json.loads((output / "results.json").read_text())


def test_every_network_is_measured_by_every_measure(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, results = evaluated
    assert [n["network"] for n in results["networks"]] == list(NETWORKS)
    for network in results["networks"]:
        assert set(network["mean"]) == set(MEASURES)
        assert np.isfinite(list(network["mean"].values())).all(), network
        assert all(0 <= value <= 1 for value in network["mean"].values()), network
        assert network["seconds"] > 0
        assert network["parameters"] > 0
        assert network["microseconds"] > 0
        assert set(network["recall_by_scenario"]) == {"1", "2", "3"}


def test_what_a_network_sees_and_remembers_shows_in_what_it_finds(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, results = evaluated
    ap = {n["network"]: n["mean"]["average_precision"] for n in results["networks"]}
    assert ap["gru"] > 1.1 * ap["transaction"]
    assert ap["feed-forward"] > 1.1 * ap["transaction"]
    assert ap["lightgbm"] > 1.1 * ap["transaction"]
    parameters = {n["network"]: n["parameters"] for n in results["networks"]}
    order = ["transaction", "feed-forward", "rnn", "gru", "gru-2", "gru-3"]
    assert [parameters[n] for n in order] == sorted(parameters[n] for n in order)


def test_the_forecast_is_compared_on_the_days_of_the_test(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, results = evaluated
    found = results["forecast"]
    assert found["rows"][0]["title"] == "forecast head"
    assert len(found["rows"]) == 6
    assert 0 < found["days"] <= 30 * found["samples"]
    assert found["groups"]["all"][1] == found["days"]
    assert len(found["following"]) == 4


def test_the_results_describe_the_data_and_the_folds(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, results = evaluated
    assert results["folds"] == {
        "split": "trained to 2018-04-30, tested 2018-05-08 to 2018-05-30",
    }
    log = simulated_dataset(**SIMULATED)
    assert results["data"]["transactions"] == len(log)
    assert [cost["title"] for cost in results["robustness"]["faults"]]
    assert len(results["robustness"]["weeks"]) == 4


def test_card_and_plots_are_written_with_all_sections(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    output, results = evaluated
    card = (output / "model_card.md").read_text(encoding="utf-8")
    for heading in (
        *("What it is", "Inputs", "Data", "Protocol", "How good it is", "By kind of fraud"),
        *("Forecasts", "Robustness", "Thresholds", "Limits"),
    ):
        assert f"\n## {heading}\n" in card
    assert results["data"]["digest"] in card
    for network in results["networks"]:
        ap = in_figures("average_precision", network["mean"]["average_precision"])
        assert f"| {network['title']} |" in card
        assert f"| {ap} |" in card
    for name in ("pr.png", "calibration.png"):
        assert f"({name})" in card
        content = (output / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_the_gru_of_a_comparison_is_a_checkpoint_of_its_scores(
    evaluated: tuple[Path, dict[str, Any]], log: Dataset, tmp_path: Path
) -> None:
    output, results = evaluated
    (path,) = (output / "runs").glob("gru-split-1-*.safetensors")
    checkpoint = Checkpoint.load(path)
    assert checkpoint.header.data_digest == results["data"]["digest"]
    comparer = Comparer(log, ComparisonSettings(networks=()), tmp_path, given=checkpoint)
    comparison = comparer.compare("split", [split_fold(log)])
    (run,) = comparison.runs
    (gru,) = (n for n in results["networks"] if n["network"] == "gru")
    assert run.metrics["average_precision"] == pytest.approx(
        gru["mean"]["average_precision"], abs=1e-4
    )
    assert run.seconds == 0


def test_a_checkpoint_that_may_have_seen_the_test_gets_a_caution(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output, results = evaluated
    assert results["cautions"] == []
    (path,) = (output / "runs").glob("gru-split-1-*.safetensors")
    trained = Checkpoint.load(path)
    other = tmp_path / "other.safetensors"
    options = EvaluateOptions(
        output=tmp_path, networks=(), checkpoint=other, plots=False, training=SIMULATED
    )
    for training, cautions in (
        ({"train_until": "2018-05-01"}, 0),
        ({"train_until": "2018-06-01"}, 1),
        ({}, 1),
    ):
        trained.with_header(training=training).save(other)
        found = run_evaluate(options)
        assert len(found.cautions) == cautions
        card = (tmp_path / "model_card.md").read_text(encoding="utf-8")
        assert card.count("Caution: ") == cautions
        assert f"# Model card: Recur {trained.digest}" in card


def test_the_account_head_and_the_reasons_are_measured(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    output, results = evaluated
    (gru,) = (n for n in results["networks"] if n["network"] == "gru")
    assert set(gru["account_head"]) == set(MEASURES)
    assert gru["account_head"]["auc_roc"] > 0.55
    card = (output / "model_card.md").read_text(encoding="utf-8")
    assert "its account head" in card
    assert set(results["first_reasons_agree"]) <= {"1", "2", "3"}
    assert results["first_reasons_agree"]
    assert "\n## Reasons\n" in card


def test_the_same_command_trains_nothing_again_and_another_network_only_that(
    short_log: Dataset, tmp_path: Path
) -> None:
    fold = split_fold(short_log)
    training = TrainingSettings(**SMALL | {"epochs": 1})

    def compare(*networks: str) -> tuple[list[Run], set[str]]:
        stages: set[str] = set()

        def note(report: Report) -> None:
            if report.note:
                stages.add(report.stage)

        settings = ComparisonSettings(networks=networks, training=training)
        return Comparer(short_log, settings, tmp_path, tmp_path / "runs").compare(
            "split", [fold], note
        ).runs, stages

    first, trained = compare("transaction")
    assert trained == {"feed-forward, transaction alone, split, seed 1"}
    again, trained = compare("transaction", "rnn")
    assert trained == {"vanilla RNN, split, seed 1"}
    assert again[0] == first[0]
    for file in (tmp_path / "runs").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])  # truncated
    third, trained = compare("transaction")
    assert trained == {"feed-forward, transaction alone, split, seed 1"}
    assert third[0].metrics == first[0].metrics


def test_a_cached_training_of_another_recipe_is_trained_again(
    short_log: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ComparisonSettings(
        networks=("transaction",), training=TrainingSettings(**SMALL | {"epochs": 1})
    )

    def compare() -> None:
        comparer = Comparer(short_log, settings, tmp_path, tmp_path / "runs")
        comparer.compare("split", [split_fold(short_log)])

    compare()
    compare()
    assert len(list((tmp_path / "runs").glob("*.npz"))) == 1
    monkeypatch.setattr("model.evaluation.comparison.RECIPE", RECIPE + 1)
    compare()
    assert len(list((tmp_path / "runs").glob("*.npz"))) == 2


def test_lightgbm_gets_the_extra_fields_that_networks_get(log: Dataset, tmp_path: Path) -> None:
    """The first and third of four texts mark fraud, so the order of the codes is no help."""
    rng = np.random.default_rng(1)
    marked = log.is_fraud & (rng.random(len(log)) < 0.8)
    code = np.where(marked, 2 * rng.integers(0, 2, len(log)), 2 * rng.integers(0, 2, len(log)) + 1)
    fields = dataclasses.replace(
        log,
        categorical={"kind": code.astype(np.int32)},
        texts={"kind": ["a", "b", "c", "d"]},
        numeric={"noise": rng.normal(size=len(log)).astype(np.float32)},
    )
    settings = ComparisonSettings(networks=("lightgbm",), trees=20)
    ap = {
        len(data.texts): Comparer(data, settings, tmp_path)
        .compare("split", [split_fold(data)])
        .runs[0]
        .metrics["average_precision"]
        for data in (log, fields)
    }
    assert ap[1] > max(0.75, 1.3 * ap[0])


def test_progress_rises_to_1(short_log: Dataset, tmp_path: Path) -> None:
    done: list[float] = []
    settings = ComparisonSettings(
        networks=("transaction", "lightgbm"),
        training=TrainingSettings(**SMALL | {"epochs": 1}),
        trees=10,
    )
    Comparer(short_log, settings, tmp_path).compare(
        "split", [split_fold(short_log)], lambda r: done.append(r.done)
    )
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0.0, 1.0)


def test_labels_after_the_training_days_do_not_change_a_score_of_the_test(
    short_log: Dataset, tmp_path: Path
) -> None:
    """LightGBM and networks learn only from the training days of the fold."""
    fold = split_fold(short_log)
    later = np.flatnonzero(short_log.timestamp_ms >= (fold.test_until - 7) * 86_400_000)
    label = short_log.label.copy()
    label[later] = 1 - label[later]  # their labels arrive after the test
    changed = Dataset(
        short_log.account,
        short_log.merchant,
        short_log.amount,
        short_log.timestamp_ms,
        label,
        short_log.scenario,
    )
    settings = ComparisonSettings(
        networks=("feed-forward", "lightgbm"),
        training=TrainingSettings(**SMALL | {"epochs": 1}),
        trees=10,
    )
    scores = [
        Comparer(of, settings, tmp_path).compare("split", [fold]).scores
        for of in (short_log, changed)
    ]
    for key, values in scores[0].items():
        assert np.array_equal(values, scores[1][key]), key


def test_seeds_give_a_mean_and_a_deviation() -> None:
    metrics = dict.fromkeys(MEASURES, 0.5)
    runs = [
        Run(
            network="gru",
            fold=fold,
            seed=seed,
            seconds=1.0,
            parameters=3,
            microseconds=2.0 + seed,
            metrics=metrics | {"average_precision": ap},
            recall_by_scenario={1: ap},
        )
        for fold, seed, ap in (("a", 1, 0.6), ("b", 1, 0.8), ("a", 2, 0.7), ("b", 2, 0.9))
    ]
    found = summarise("gru", runs)
    assert found.mean["average_precision"] == pytest.approx(0.75)
    assert found.deviation["average_precision"] == pytest.approx(0.1 / 2**0.5)  # of .7 and .8
    assert found.microseconds == 3.0
    assert found.recall_by_scenario == {1: pytest.approx(0.75)}
    assert not summarise("gru", runs[:2]).deviation


def test_a_curve_of_precision_and_recall_is_that_of_its_thresholds() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, 300).astype(np.float32) / 20
    is_fraud = rng.random(300) < scores
    found = set(
        zip(*(c.round(9).tolist() for c in precision_recall_curve(scores, is_fraud)), strict=True)
    )
    expected = set()
    for threshold in np.unique(scores):
        over = scores >= threshold
        recall = is_fraud[over].sum() / is_fraud.sum()
        expected.add((round(float(recall), 9), round(float(is_fraud[over].mean()), 9)))
    assert found <= expected
    assert {recall for recall, _ in found} == {recall for recall, _ in expected}


@pytest.fixture
def file(log: Dataset, tmp_path: Path) -> Path:
    """Write the log to a file with the Handbook's columns."""
    table = pa.table(
        {
            "TRANSACTION_ID": np.arange(len(log)),
            "TX_DATETIME": log.timestamp_ms.astype("datetime64[ms]"),
            "CUSTOMER_ID": log.account,
            "TERMINAL_ID": log.merchant,
            "TX_AMOUNT": log.amount,
            "TX_FRAUD": log.label,
            "TX_FRAUD_SCENARIO": log.scenario,
        }
    )
    pa.parquet.write_table(table, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_the_command_compares_on_a_file_by_the_handbooks_folds(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    cli.recur(
        [
            *("evaluate", str(file), "--columns", "handbook", "--protocol", "handbook"),
            *("--fold-start", "2018-05-09", "--networks", "transaction"),
            *("--epochs", "1", "--output", str(output)),
        ],
        standalone_mode=False,
    )
    shown = capsys.readouterr().out
    assert "feed-forward, transaction alone" in shown
    assert "published best" in shown
    assert ".687" in shown
    results = json.loads((output / "results.json").read_text())
    assert list(results["folds"]) == ["week-1", "week-2", "week-3", "week-4"]
    assert [n["runs"] for n in results["networks"]] == [4]
    assert results["robustness"] is None
    assert "# Comparison of networks" in (output / "model_card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "gru,perceptron"], "there is no network 'perceptron'; choose of"),
        (["--train-until", "2030-01-01"], "choose other dates"),
        (["--protocol", "handbook", "--fold-start", "soon"], "'soon' is no date"),
        (["--epochs", "0"], "epochs is 0"),
        (["--seeds", "0"], "seeds is 0"),
    ],
)
def test_an_impossible_option_is_reported_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--customers", "60", "--terminals", "60", "--days", "40"]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *small, "--output", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert message in error


def test_a_missing_requirement_is_reported_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingRequirementError("pip install 'recur[evaluate]'")

    monkeypatch.setitem(__import__("sys").modules, "lightgbm", None)
    with pytest.raises(MissingRequirementError, match=r"recur\[evaluate\].*leave lightgbm out"):
        reference.lightgbm()
    with pytest.raises(RecurError, match="LightGBM cannot be loaded"):
        run_evaluate(EvaluateOptions(output=tmp_path, training=SIMULATED))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match="matplotlib cannot be loaded"):
        plots.require_matplotlib()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecurError, match="cannot make the folder"):
        run_evaluate(EvaluateOptions(output=tmp_path / "file" / "out", training=SIMULATED))


def test_kinds_have_unique_titles() -> None:
    assert len({kind.title for kind in KINDS.values()}) == len(KINDS)
    with pytest.raises(ComparisonError, match="there is no network"):
        ComparisonSettings(networks=("perceptron",))


def test_a_checkpoint_with_fields_that_the_data_lack_is_refused(
    evaluated: tuple[Path, dict[str, Any]], log: Dataset, tmp_path: Path
) -> None:
    output, _ = evaluated
    (path,) = (output / "runs").glob("gru-split-1-*.safetensors")
    checkpoint = Checkpoint.load(path)
    features = msgspec.structs.replace(
        checkpoint.header.features, fields=(Field("age", "numeric"),), ranges=()
    )
    with pytest.raises(ComparisonError, match="the fields age, which the data do not have"):
        Comparer(
            log, ComparisonSettings(), tmp_path, given=checkpoint.with_header(features=features)
        )


def test_an_unknown_run_is_not_in_the_cache(tmp_path: Path) -> None:
    assert RunCache(tmp_path).get("gru-split-1-0") is None
