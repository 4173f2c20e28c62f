"""`recur thresholds`: the chosen thresholds reach their goals on the validation days."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from model.architecture import Architecture
from model.checkpoint import Checkpoint, CheckpointThresholds, Header
from model.features.spec import INPUTS, FeatureSpec
from model.metrics import operating_points
from model.network import Network
from model.thresholds import OperatingPoints, ThresholdGoals
from pipeline.cli.main import main, recur
from pipeline.errors import RecurError

DAYS = 7.0


@dataclass
class Validation:
    """Validation days of a good but imperfect detector."""

    score: NDArray[np.float32]
    is_fraud: NDArray[np.bool_]
    amount: NDArray[np.float64]


def validation(seed: int = 0) -> Validation:
    rng = np.random.default_rng(seed)
    is_fraud = rng.random(50_000) < 0.01
    score = 1 / (1 + np.exp(5 - rng.normal(5 * is_fraud, 1.5)))
    return Validation(score.astype(np.float32), is_fraud, rng.gamma(2.0, 40.0, 50_000))


DATA = validation()


def checkpoint(**changes: object) -> Checkpoint:
    torch.manual_seed(0)
    architecture = Architecture(
        len(INPUTS), input_size=4, hidden_size=8, head_size=4, roles=FeatureSpec().roles
    )
    fraud = float(DATA.amount[DATA.is_fraud].sum())
    header = {
        "thresholds": CheckpointThresholds(review=0.4, decline=0.8),
        "operating_points": operating_points(DATA.score, DATA.is_fraud, DATA.amount, DAYS),
        "validation": {
            "days": DAYS,
            "transactions": float(len(DATA.score)),
            "frauds": float(DATA.is_fraud.sum()),
            "fraud_amount_per_day": fraud / DAYS,
            "legitimate_amount_per_day": (float(DATA.amount.sum()) - fraud) / DAYS,
        },
    } | changes
    return Checkpoint.of(
        Network(architecture),
        Header(architecture=architecture, features=FeatureSpec(), **header),  # type: ignore[arg-type]
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint().save(path)
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(recur, ["thresholds", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def written(file: Path) -> CheckpointThresholds:
    return Checkpoint.load(file).header.thresholds


def alerts_per_day(threshold: float) -> float:
    return float((DATA.score >= np.float32(threshold)).sum() / DAYS)


@pytest.mark.parametrize("budget", [5, 20, 100.5, 800])
def test_the_budget_of_alerts_is_kept_and_nearly_used(file: Path, budget: float) -> None:
    run(file, "--alerts-per-day", budget, "--decline", "precision=0.9")

    assert budget * 0.85 < alerts_per_day(written(file).review) <= budget


@pytest.mark.parametrize("text", ["0.002", "0.2%", "0.2 %"])
def test_the_false_positive_rate_is_kept(file: Path, text: str) -> None:
    run(file, "--review", f"false-positive-rate={text}")

    rate = (DATA.score[~DATA.is_fraud] >= np.float32(written(file).review)).mean()
    assert 0.0016 < rate <= 0.002


def test_the_precision_is_reached_at_the_decline_threshold(file: Path) -> None:
    run(file, "--review", "alerts-per-day=200", "--decline", "precision=90%")

    over = DATA.score >= np.float32(written(file).decline)
    assert 0.9 <= DATA.is_fraud[over].mean() < 0.95
    assert over.sum() >= 20


def test_a_threshold_without_a_goal_stays_unless_review_passes_decline(
    file: Path,
) -> None:
    run(file, "--review", "threshold=0.6")
    assert written(file) == CheckpointThresholds(0.6, 0.8)
    run(file, "--decline", "threshold=0.7")
    assert written(file) == CheckpointThresholds(0.6, 0.7)
    run(file, "--review", "threshold=0.9")
    assert written(file) == CheckpointThresholds(0.9, 0.9)


def cost(review: float, decline: float, per_review: float, per_decline: float) -> float:
    """Compute the cost from the transactions; a missed fraud costs its amount."""
    missed = DATA.amount[DATA.is_fraud & (DATA.score < np.float32(review))].sum()
    declined = DATA.score >= np.float32(decline)
    reviewed = (DATA.score >= np.float32(review)) & ~declined
    good = (declined & ~DATA.is_fraud).sum()
    return float((missed + per_review * reviewed.sum() + per_decline * good) / DAYS)


@pytest.mark.parametrize(("per_review", "per_decline"), [(4, 30), (1, 500), (50, 10), (5000, 5000)])
def test_costs_choose_thresholds_close_to_the_cheapest(
    file: Path, per_review: float, per_decline: float
) -> None:
    output = run(file, "--cost-review", per_review, "--cost-decline", per_decline)

    chosen = written(file)
    found = cost(chosen.review, chosen.decline, per_review, per_decline)
    grid = np.quantile(DATA.score, 1 - np.geomspace(1e-4, 0.5, 60))
    best = min(cost(r, d, per_review, per_decline) for r in grid for d in grid if d >= r)
    assert found <= best * 1.01
    assert f"{found:,.0f} after" in output


def test_expected_values_are_those_of_the_validation_days(file: Path) -> None:
    points = OperatingPoints(Checkpoint.load(file).header)
    for threshold in (0.05, 0.4, 0.8, 0.95):
        point = points.at(threshold)
        over = DATA.score >= np.float32(threshold)
        assert point.alerts_per_day == pytest.approx(over.sum() / DAYS, rel=0.05, abs=0.2)
        assert point.recall == pytest.approx(over[DATA.is_fraud].mean(), abs=0.01)
        assert point.precision == pytest.approx(DATA.is_fraud[over].mean(), abs=0.02)


def test_weights_and_digest_stay_and_the_table_names_its_data(file: Path) -> None:
    before = Checkpoint.load(file)

    output = run(file, "--alerts-per-day", 50)

    after = Checkpoint.load(file)
    assert after.digest == before.digest
    assert after.header.operating_points == before.header.operating_points
    assert "before" in output
    assert "after" in output
    assert "7 validation days with 50,000 transactions" in output
    assert sorted(p.name for p in file.parent.iterdir()) == [file.name]


def test_a_dry_run_and_no_goal_write_nothing(file: Path) -> None:
    content = file.read_bytes()

    assert "after" in run(file, "--alerts-per-day", 50, "--dry-run")
    assert "now" in run(file)

    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--review", "alerts=5"], "a goal is one of alerts-per-day=NUMBER"),
        (["--alerts-per-day", "-3"], "alerts-per-day takes a number over 0"),
        (["--alerts-per-day", "5%"], "alerts-per-day takes a number over 0"),
        (["--alerts-per-day", "0.01"], "the fewest alerts a day are 0.143"),
        (["--precision", "1.5"], "precision takes a number over 0 and at most 1"),
        (["--precision", "nan"], "precision takes a number over 0 and at most 1"),
        (["--precision", "0.5", "--alerts-per-day", "5"], "has one goal"),
        (["--cost-review", "4"], "costs need --cost-decline, too"),
        (["--cost-missed", "4"], "costs need --cost-review and --cost-decline, too"),
        (["--cost-review", "4%", "--cost-decline", "3"], "a review costs an amount"),
        (["--cost-review", "much", "--cost-decline", "3"], "'much' is neither"),
        (["--cost-review", "4", "--cost-decline", "3", "--precision", "0.9"], "not both"),
    ],
)
def test_an_impossible_goal_is_answered_with_the_nearest_result(
    file: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = file.read_bytes()

    with pytest.raises(SystemExit) as end:
        main(["thresholds", str(file), *options])

    assert end.value.code == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operating_points": []}, "carries no operating points"),
        ({"operating_points": [[0.5, 1.0]]}, "carries no operating points"),
        ({"validation": {"days": 7.0}}, "does not say its validation's fraud_amount_per_day"),
    ],
)
def test_a_checkpoint_without_operating_points_is_rejected(
    tmp_path: Path, changes: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.safetensors"
    checkpoint(**changes).save(path)

    with pytest.raises(SystemExit):
        main(["thresholds", str(path), "--alerts-per-day", "5"])

    assert words in capsys.readouterr().err


def test_a_precision_of_few_alerts_is_not_trusted(tmp_path: Path) -> None:
    points = [[0.9, 1.0, 0.1, 0.0, 1.0, 9.0, 0.0], [0.5, 5.0, 0.3, 0.001, 0.6, 20.0, 10.0]]
    path = tmp_path / "model.safetensors"
    checkpoint(operating_points=points).save(path)

    with pytest.raises(RecurError, match=r"the highest on 20 alerts or more is 0\.6"):
        run(path, "--decline", "precision=0.9")


def test_help_explains_with_examples() -> None:
    text = run("--help")

    for line in [
        "recur thresholds model.safetensors --alerts-per-day 100",
        "--cost-review 4 --cost-decline 30",
        "--decline precision=0.9",
    ]:
        assert line in text


def test_nothing_is_chosen_without_a_goal() -> None:
    points = OperatingPoints(checkpoint().header)

    assert ThresholdGoals().choose(points, CheckpointThresholds(0.4, 0.8)) is None
