"""`recur probe`: it finds planted faults and measures a known exposure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import pipeline
import pipeline.cli.probe
from model.architecture import Architecture
from model.checkpoint import Amounts, Checkpoint, CheckpointThresholds, Header
from model.evaluation.lightgbm_reference import MissingRequirementError
from model.features.amount_scale import AmountScale
from model.features.merchant import BUCKET_MS, Labels, observe_merchant_log
from model.features.spec import FeatureSpec, Input, Role
from model.metrics import OPERATING_POINT
from model.network import Network
from model.probe.exposure import (
    AMOUNT_MOST,
    ExposureSettings,
    Plan,
    Thief,
    given_plans,
    measure_exposure,
    random_plans,
    variants,
)
from model.probe.histories import (
    NOW_MS,
    History,
    catalogue,
    found_histories,
    paying,
    replay,
    simulated_log,
)
from model.probe.scorer import Frauds, Merchant, ProbeScorer, merchant_raw
from model.probe.sweeps import (
    AMOUNT_SWEEP,
    FRAUDS_SWEEP,
    LARGE_AMOUNTS,
    Curves,
    ProbeResult,
    ProbeSettings,
    allowed_fall,
    falls_of,
    probe,
    short_probe,
)
from model.training.sequences import score_stepwise
from model.units import DAY_MS
from pipeline.cli.main import main

SHIPPED = Path(pipeline.__file__).parent / "checkpoints" / "default.safetensors"

TINY = ProbeSettings(
    form="short",
    amounts=40,
    contexts=2,
    fraud_cases=3,
    repeats=3,
    found=6,
    longest=60,
    exposure=ExposureSettings(
        accounts=6, tried=2, random_plans=1, varied=1, kept=2, rates=(0.002,), payments_max=4
    ),
    customers=60,
    days=20,
)

REVIEW = 0.5


class FreeInput(Input, frozen=True):
    """An input whose weights may have any sign, as in a network that is not monotone."""

    @property
    def role(self) -> Role:
        return "own"


def toy(
    inputs: Sequence[Input],
    weights: Sequence[float],
    bias: float,
    bend: tuple[int, float, float] | None = None,
    median: float = 40.0,
) -> Checkpoint:
    """Make a checkpoint whose logit is a sum over non-negative inputs, without a state.

    Args:
        weights: weights of the inputs.
        bend: an input, a value, and the weight added to the input's weight from there on.
        bias: bias of the logit.
        inputs: the inputs.
        median: median amount of the training.
    """
    n = len(inputs)
    spec = FeatureSpec(tuple(inputs), scale=AmountScale(median / 40, median))
    architecture = Architecture(
        n, input_size=n + 1, hidden_size=2, head_size=n + 1, roles=spec.roles
    )
    network = Network(architecture)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.free_layer.weight[:n] = torch.eye(n)
        for i in range(n + 1):
            network.head.weight[i, architecture.hidden_size + i] = 1.0
        network.logit.weight[0, :n] = torch.tensor(weights)
        network.logit.bias[0] = bias
        if bend is not None:
            which, value, weight = bend
            network.free_layer.weight[n, which] = 1.0
            network.free_layer.bias[n] = -value
            network.logit.weight[0, n] = weight
    return Checkpoint.of(
        network,
        Header(
            architecture=architecture,
            features=spec,
            thresholds=CheckpointThresholds(REVIEW, 0.9),
            amounts=Amounts((0.0, median), 0.5),
        ),
    )


AMOUNT = Input("amount", "log1p", at_most=1e12)  # free, because it has its own bound
KNOWN_FRAUDS = FreeInput("merchant_known_frauds", "log1p")


def monotone() -> Checkpoint:
    return toy([AMOUNT, KNOWN_FRAUDS], [1.0, 1.0], -5.0)


def planted(sweep: str) -> Checkpoint:
    """Make a checkpoint whose scores fall above an amount of 400, or from the third fraud on."""
    where, value = {AMOUNT_SWEEP: (0, np.log1p(400.0)), FRAUDS_SWEEP: (1, np.log1p(2.0))}[sweep]
    return toy([AMOUNT, KNOWN_FRAUDS], [1.0, 1.0], -5.0, bend=(where, float(value), -2.0))


def planted_in_a_file(path: Path) -> Path:
    """Write a checkpoint whose scores fall above an amount of 400."""
    toy([AMOUNT], [1.0], -5.0, bend=(0, float(np.log1p(400.0)), -2.0)).save(path)
    return path


def drawn() -> Checkpoint:
    """Make a checkpoint with a complete network of random weights."""
    torch.manual_seed(3)
    spec = FeatureSpec()
    architecture = Architecture(
        len(spec.roles), input_size=8, hidden_size=16, head_size=8, roles=spec.roles
    )
    return Checkpoint.of(Network(architecture), Header(architecture=architecture, features=spec))


@pytest.fixture(scope="module")
def passed() -> ProbeResult:
    return probe(monotone(), TINY)


@pytest.fixture(scope="module")
def failed() -> dict[str, ProbeResult]:
    """Probe a checkpoint with a fall planted in a sweep."""
    return {sweep: probe(planted(sweep), TINY) for sweep in (AMOUNT_SWEEP, FRAUDS_SWEEP)}


def test_a_monotone_network_passes(passed: ProbeResult) -> None:
    result = passed
    assert not result.failed
    assert result.violations == result.large.under_smaller == 0
    assert set(result.violations_by_sweep) == {AMOUNT_SWEEP, FRAUDS_SWEEP}
    assert "no violation" in next(result.lines())


@pytest.mark.parametrize("sweep", [AMOUNT_SWEEP, FRAUDS_SWEEP])
def test_a_planted_fall_is_found_and_named(sweep: str, failed: dict[str, ProbeResult]) -> None:
    result = failed[sweep]
    assert result.failed
    other = ({AMOUNT_SWEEP, FRAUDS_SWEEP} - {sweep}).pop()
    assert result.violations_by_sweep[other] == 0
    assert result.violations_by_sweep[sweep] == result.violations
    fall = result.falls[0]
    assert fall.sweep == sweep
    step = 10 ** (9 / (TINY.amounts - 2))  # a step of the grid of amounts, or more
    if sweep == AMOUNT_SWEEP:
        assert 400 / step < fall.from_value < 400 * step
        assert fall.to_value == pytest.approx(100_000)
        assert result.violations == TINY.contexts * result.histories
    else:
        assert (fall.from_value, fall.to_value) == (2, 100)
    assert fall.from_score > fall.to_score
    assert fall.history in "\n".join(result.lines())


def test_a_fall_under_half_the_usual_amount_is_no_violation() -> None:
    """The usual amount is 60,000; the score may fall with amounts below half of it."""
    scores = np.array([[0.9, 0.5, 0.5, 0.6], [0.9, 0.5, 0.5, 0.6]], np.float32)
    required = np.array([[False, True, True, True], [True, True, True, True]])
    curves = Curves("amount", "as usual", np.array([1.0, 2.0, 3.0, 4.0]), scores, None, required)
    (fall,) = falls_of(curves, ["may", "must not"])
    assert fall.history == "must not"
    assert (fall.from_value, fall.to_value, fall.falls) == (1.0, 2.0, 3)


def test_rounding_is_allowed_and_more_is_not() -> None:
    scores = np.array([0.5, 0.01, 1e-5])
    allowed = allowed_fall(scores)
    assert allowed.tolist() == pytest.approx([1e-4, 1e-5, 1e-6])
    for share, falls in ((0.9, 0), (1.1, 3)):
        pairs = np.stack((scores, scores - share * allowed), 1)
        curves = Curves("s", "c", np.arange(2.0), pairs, None, np.ones(pairs.shape, np.bool_))
        assert len(falls_of(curves, ["a", "b", "c"])) == falls


def test_an_input_that_leaves_its_range_is_reported_and_no_violation() -> None:
    ranged = toy([AMOUNT], [1.0], -5.0)
    spec = ranged.header.features
    ranges = [(-1e9, 1e9)] * len(spec.names)
    ranges[spec.names.index("amount")] = (0.0, 500.0)
    features = msgspec.structs.replace(spec, ranges=tuple(ranges))
    result = probe(ranged.with_header(features=features), TINY)
    assert not result.failed
    assert result.states_ranges
    (left,) = [left for left in result.out_of_range if left.sweep == AMOUNT_SWEEP]
    assert (left.feature, left.low, left.high) == ("amount", 0.0, 500.0)
    assert 500 < left.first_value < 1_000
    assert left.histories == result.histories


def test_large_payments_are_listed_with_what_is_wrong(failed: dict[str, ProbeResult]) -> None:
    large = failed[AMOUNT_SWEEP].large
    assert large.amounts == list(LARGE_AMOUNTS)
    row = next(row for row in large.rows if row.history == "15 payments of 5")
    assert 5 <= row.usual < 10
    # The logit is log1p(amount) - 5 up to 400, and falls above; it is below 0 from 1,080 on.
    assert [score is not None and score < REVIEW for score in row.score] == [False] * 3 + [True] * 6
    assert row.under_smaller == [False] * 3 + [True] * 6
    assert large.approved == large.under_smaller > 0
    business = next(row for row in large.rows if row.history == "business card")
    assert business.score[:5] == [None] * 5  # no payment is large for it


@pytest.mark.parametrize(("median", "scale"), [(43.8, 1.0), (700_000.0, 10_000.0), (5_000.0, 100)])
def test_the_catalogue_is_in_the_currency_of_the_checkpoint(median: float, scale: float) -> None:
    checkpoint = toy([AMOUNT], [1.0], -5.0, median=median)
    scorer = ProbeScorer(checkpoint)
    assert scorer.scale == scale
    first, *_ = catalogue(scorer.scale)
    assert set(first.amount) == {scale}
    assert scorer.usual(scorer.empty(1)) == pytest.approx([median])


def test_a_probe_in_another_currency_finds_the_same() -> None:
    """Amounts are in hundreds of thousands, and the planted fall is at 400 x 10,000."""
    value = float(np.log1p(4e6))
    checkpoint = toy([AMOUNT], [1.0], -12.0, bend=(0, value, -2.0), median=400_000.0)
    result = probe(checkpoint, TINY)
    assert result.scale == 10_000
    assert result.large.amounts == [10_000.0 * amount for amount in LARGE_AMOUNTS]
    assert result.violations == TINY.contexts * result.histories
    assert result.falls[0].from_value == pytest.approx(4e6, rel=0.8)


def test_states_and_scores_are_those_of_a_worker() -> None:
    checkpoint = drawn()
    scorer = ProbeScorer(checkpoint)
    rng = np.random.default_rng(1)
    merchants = rng.uniform(0, 5, (12, 12)).astype(np.float32)
    histories = [
        History(
            str(n),
            "",
            rng.uniform(1, 90, n),
            NOW_MS + np.sort(rng.integers(0, DAY_MS, n)),
            DAY_MS,
            merchants[:n],
        )
        for n in (3, 12, 1, 0)
    ]
    states, scores = replay(scorer, histories)
    for number, history in enumerate(histories):
        account = np.zeros(len(history), np.int64)
        if not len(history):
            assert states.history.count[number] == 0
            continue
        expected, after, hidden = score_stepwise(
            checkpoint, account, history.amount, history.timestamp_ms, history.merchant
        )
        assert scores[number] == pytest.approx(expected, abs=1e-6)
        assert states.history.take(np.array([number])).usual_amount == after.usual_amount
        assert np.allclose(states.hidden[number], hidden[0], atol=1e-3)


def test_a_variant_scores_as_the_step_that_makes_it() -> None:
    scorer = ProbeScorer(drawn())
    states, _ = replay(scorer, catalogue(1.0)[:6])
    merchant = scorer.merchants([Merchant(20.0)], NOW_MS)
    rows = np.tile(np.arange(6), 300)  # more than a chunk
    amount = np.linspace(0, 500, len(rows))
    times = np.full(len(rows), NOW_MS)
    scores = scorer.scores(states, rows, amount, times, merchant)
    with scorer.working():
        assert np.array_equal(scores, scorer.scores(states, rows, amount, times, merchant))
        stepped, _ = scorer.advance(states.take(rows), amount, times, merchant)
    assert scores == pytest.approx(stepped, abs=1e-6)


def test_a_described_merchant_has_the_features_of_its_log() -> None:
    """There are 24 payments a day for 20 days, and 3 of one bucket become known as fraud."""
    days, delay_ms = 20, 7 * DAY_MS
    now = NOW_MS // BUCKET_MS * BUCKET_MS + BUCKET_MS // 2
    first = now // BUCKET_MS - days * 8
    of_bucket = np.arange(3) * 1_000_000
    times = ((first + np.arange(days * 8))[:, None] * BUCKET_MS + of_bucket).ravel()
    fraud = (days * 8 - 80) * 3 + np.arange(3)  # ten days ago
    log_times = np.append(times, now)
    labels = Labels(fraud, np.full(3, now - 2 * DAY_MS))
    expected = observe_merchant_log(
        np.zeros(len(log_times), np.int64), log_times, labels, delay_ms
    )[-1:]
    merchant = Merchant(24.0, days, (Frauds(10.0, 2.0, 3),))
    assert np.array_equal(merchant_raw([merchant], now, delay_ms), expected)


def test_accounts_of_a_log_are_of_all_lengths_and_levels() -> None:
    log = simulated_log(300, 20, 1.0)
    found = found_histories(log, FeatureSpec(), 30)
    assert 20 <= len(found) <= 30
    lengths = np.bincount(log.account)
    assert min(map(len, found)) <= np.quantile(lengths[lengths > 0], 0.2)
    assert max(map(len, found)) >= np.quantile(lengths, 0.8)
    for history in found[:5]:
        assert (np.diff(history.timestamp_ms) >= 0).all()
        assert history.merchant is not None
        assert len(history.merchant) == len(history)
    clean = found_histories(log, FeatureSpec(), 10_000, payments_min=5, flagged=False)
    assert min(map(len, clean)) >= 5
    frauds = np.unique(log.account[log.is_fraud])
    assert len(clean) == (np.delete(lengths, frauds) >= 5).sum()


def of_amount(threshold: float = REVIEW) -> tuple[Checkpoint, float]:
    """Make a score that depends on the amount alone; return its amount at the threshold."""
    checkpoint = toy([AMOUNT], [2.0], -9.0)
    return checkpoint, float(np.expm1((np.log(threshold / (1 - threshold)) + 9.0) / 2.0))


def accounts() -> list[History]:
    return [
        paying(f"{n} of {level}", "", [level] * n, DAY_MS, DAY_MS)
        for n, level in ((6, 5.0), (30, 40.0), (90, 12.0))
    ]


@pytest.mark.parametrize("monotone", [True, False])
def test_the_largest_amount_under_a_threshold_is_found(monotone: bool) -> None:
    for threshold in (0.01, 0.5, 0.97):
        checkpoint, expected = of_amount(threshold)
        scorer = ProbeScorer(checkpoint)
        states, _ = replay(scorer, accounts())
        thief = Thief(scorer, states, accounts(), monotone)
        merchant = np.repeat(scorer.merchants([Merchant(20.0)], NOW_MS), 3, 0)
        found = thief.largest_under(states, np.full(3, NOW_MS), merchant, threshold)
        assert (found <= expected).all()
        assert found == pytest.approx(np.full(3, expected), rel=0.02)
    assert (thief.largest_under(states, np.full(3, NOW_MS), merchant, 1e-9) == 0).all()
    assert thief.largest_under(states, np.full(3, NOW_MS), merchant, 1.1) == pytest.approx(
        np.full(3, AMOUNT_MOST)
    )


def test_an_amount_that_passes_again_past_an_alarm_is_found() -> None:
    """An earlier checkpoint had this fault: an alert at 400 and none at 10,000."""
    checkpoint = planted(AMOUNT_SWEEP)
    scorer = ProbeScorer(checkpoint)
    states, _ = replay(scorer, accounts())
    thief = Thief(scorer, states, accounts(), monotone=False)
    merchant = np.repeat(scorer.merchants([Merchant(20.0)], NOW_MS), 3, 0)
    found = thief.largest_under(states, np.full(3, NOW_MS), merchant, REVIEW)
    assert found == pytest.approx(np.full(3, AMOUNT_MOST))


def test_a_known_exposure_is_measured() -> None:
    """The score depends on the amount alone, so the best plan is the most payments."""
    checkpoint, largest = of_amount()
    log = simulated_log(60, 30, 1.0)
    settings = ExposureSettings(
        accounts=20, tried=4, random_plans=2, varied=1, kept=2, payments_max=10
    )
    found = measure_exposure(ProbeScorer(checkpoint), log, settings)
    assert found.review is not None
    for taken in (found.review.day, found.review.week):
        assert taken.payments == 10
        assert taken.median_amount == pytest.approx(10 * largest, rel=0.03)
        assert taken.p99_amount == pytest.approx(10 * largest, rel=0.03)
        assert taken.at_bound == 1.0  # more payments would take more
    spent = found.spent_per_day
    assert found.review.week.median == pytest.approx(10 * largest / spent / 7, rel=0.1)
    assert set(found.metrics()) == {
        f"probe_exposure_{name}_{measure}"
        for name in ("day", "week")
        for measure in ("median", "p99")
    }


def test_a_thief_waits_if_a_pause_pays() -> None:
    """Larger payments pass after a pause; the result of the best plan is known."""
    # logit = 2 log1p(amount) - 1.6 log1p(seconds) + 4: amount + 1 = (1 + seconds) ** .8 / e ** 2
    checkpoint = toy([AMOUNT, Input("seconds_since_last", "log1p", mean=20.0)], [2.0, 0.0], 0.0)
    with torch.no_grad():
        network = checkpoint.network
        network.free_layer.weight[1, 1] = -1.0  # 20 - log1p(seconds) is over 0, as ReLU needs
        network.logit.weight[0, 1] = 1.6
        network.logit.bias[0] = 4.0 - 1.6 * 20.0
    checkpoint = Checkpoint.of(network, checkpoint.header)
    history = paying("20 of 30", "", [30.0] * 20, DAY_MS, DAY_MS)
    scorer = ProbeScorer(checkpoint)
    states, _ = replay(scorer, [history])
    plans = [plan for plan in given_plans(1) if (plan.share == 1.0).all() and not plan.limited]
    thief = Thief(scorer, states, [history])
    attack = thief.attack(np.zeros(1, np.intp), plans, REVIEW)
    midnight = -(-int(history.timestamp_ms[-1]) // DAY_MS) * DAY_MS

    def known(plan: Plan) -> float:
        times = np.concatenate(([history.timestamp_ms[-1]], midnight + plan.at_ms))
        return float(((1 + np.diff(times) / 1000) ** 0.8 / np.e**2 - 1).sum())

    expected = [known(plan) for plan in plans]
    assert attack.amount[0] == pytest.approx(expected, rel=0.03)
    best = plans[int(attack.amount[0].argmax())]
    assert "three weeks" in best.name
    assert attack.amount[0].max() == pytest.approx(max(expected), rel=0.03)


def test_an_attack_raises_no_alert() -> None:
    scorer = ProbeScorer(drawn())
    histories = accounts()
    states, _ = replay(scorer, histories)
    thief = Thief(scorer, states, histories, monotone=False)
    merchant = np.repeat(scorer.merchants([Merchant(20.0)], NOW_MS), 3, 0)
    times, rows = np.full(3, NOW_MS), np.arange(3)
    usual = scorer.scores(states, rows, scorer.usual(states), times, merchant)
    threshold = float(usual.max()) + 0.01
    found = thief.largest_under(states, times, merchant, threshold)
    assert (found > 0).all()
    assert (scorer.scores(states, rows, found, times, merchant) < threshold).all()

    plan = Plan("three", np.array([10, 12, 14], np.int64) * 3_600_000, np.array([0.4, 0.7, 1.0]))
    assert (thief.attack(rows, [plan], 0.0).amount == 0).all()
    everything = thief.attack(rows, [plan], 1.1)  # no score reaches it
    assert everything.at_bound.all()
    assert everything.amount == pytest.approx(np.full((3, 1), 2.1 * AMOUNT_MOST), rel=0.01)


@pytest.mark.parametrize("days", [1, 7])
def test_plans_keep_to_their_time(days: int) -> None:
    rng = np.random.default_rng(0)
    plans = [*given_plans(days), *random_plans(days, 20, rng)]
    plans += [variant for plan in plans[:10] for variant in variants(plan, 3, rng)]
    for plan in plans:
        assert 1 <= len(plan) <= 200
        assert (np.diff(plan.at_ms) >= 0).all()
        assert plan.at_ms[-1] - plan.at_ms[0] < days * DAY_MS
        assert ((plan.share > 0) & (plan.share <= 1)).all()
        assert plan.share[-1] == 1.0


def test_the_curve_goes_by_the_operating_points() -> None:
    largest = {threshold: of_amount(threshold)[1] for threshold in (0.2, 0.5, 0.8)}
    rows = [
        dict.fromkeys(OPERATING_POINT, 1.0) | {"threshold": t, "false_positive_rate": rate}
        for t, rate in ((0.8, 0.001), (0.5, 0.002), (0.2, 0.01))
    ]
    checkpoint = of_amount()[0].with_header(
        operating_points=[[row[name] for name in OPERATING_POINT] for row in rows],
        validation={
            "days": 1.0,
            "transactions": 100.0,
            "frauds": 1.0,
            "fraud_amount_per_day": 1.0,
            "legitimate_amount_per_day": 1.0,
        },
    )
    settings = ExposureSettings(
        accounts=5,
        tried=2,
        random_plans=1,
        varied=1,
        kept=2,
        payments_max=3,
        rates=(0.001, 0.002, 0.01),
    )
    found = measure_exposure(ProbeScorer(checkpoint), simulated_log(40, 20, 1.0), settings)
    assert [point.threshold for point in found.curve] == pytest.approx([0.8, 0.5, 0.2])
    for point in found.curve:
        expected = 3 * largest[point.threshold]
        assert point.day.median_amount == pytest.approx(expected, rel=0.03)
    assert found.target is not None
    assert found.target.threshold == pytest.approx(0.5)
    assert found.target_met is (max(found.target.day.median, found.target.week.median) <= 3.0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command try less."""
    monkeypatch.setattr(pipeline.cli.probe, "SHORT", TINY)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["probe", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.usefixtures("tiny")
def test_the_command_fails_on_a_violation_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(planted_in_a_file(tmp_path / "m.safetensors"), "--short") == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "from amount" in said


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_the_command_writes_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    toy([AMOUNT], [1.0], -5.0).save(tmp_path / "m.safetensors")
    json_file, plot = tmp_path / "probe.json", tmp_path / "probe.png"
    options = ("--short", "--json", json_file, "--plot", plot)
    assert run(tmp_path / "m.safetensors", *options) == 0
    assert "PASSED" in capsys.readouterr().out
    found = json.loads(json_file.read_text())
    assert found["violations"] == 0
    assert found["exposure"]["review"]["day"]["median_amount"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")

    def missing() -> None:
        raise MissingRequirementError("no matplotlib")

    monkeypatch.setattr(pipeline.cli.probe, "require_matplotlib", missing)
    plot.unlink()
    assert run(tmp_path / "m.safetensors", *options) == 0
    assert "plot is left out" in capsys.readouterr().out
    assert not plot.exists()


MAPPING = """
[columns]
account_id = "account"
merchant_id = "merchant"
amount = "amount"
timestamp = "time"
label = "label"

[constants]
currency = "EUR"

[time]
unit = "ms"
"""


@pytest.mark.usefixtures("tiny")
def test_the_command_probes_the_accounts_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = simulated_log(30, 15, 1.0)
    lines = ["account,merchant,amount,time,label"]
    lines += [
        f"A{a},M{m},{amount:.2f},{t},{int(fraud)}"
        for a, m, amount, t, fraud in zip(
            log.account, log.merchant, log.amount, log.timestamp_ms, log.is_fraud, strict=True
        )
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    (tmp_path / "mapping.toml").write_text(MAPPING)
    planted_in_a_file(tmp_path / "m.safetensors")
    data = ("--data", tmp_path / "log.csv", "--columns", tmp_path / "mapping.toml")

    json_file = tmp_path / "found.json"
    assert run(tmp_path / "m.safetensors", "--short", "--json", json_file, *data) == 1
    found = json.loads(json_file.read_text())
    assert found["histories"] > len(catalogue(1.0))
    assert any("of the data" in fall["history"] for fall in found["falls"])

    assert run(tmp_path / "m.safetensors", "--short", *data[:2]) == 2
    assert "--columns" in capsys.readouterr().err
    assert run(tmp_path / "none.safetensors") == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_checkpoint_can_be_probed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it passes is tested after its training, not here."""
    json_file = tmp_path / "found.json"
    code = run(SHIPPED, "--short", "--json", json_file)
    found = json.loads(json_file.read_text())
    assert code == (1 if found["violations"] or found["large"]["under_smaller"] else 0)
    assert found["exposure"]["review"]["day"]["median"] > 0
    assert len(found["large"]["rows"]) == found["histories"]
    assert "Exposure" in capsys.readouterr().out


def test_the_short_form_can_stand_in_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: ProbeResult
) -> None:
    monkeypatch.setattr("model.probe.sweeps.SHORT", TINY)
    result = short_probe(monotone())
    assert result.metrics() == passed.metrics()  # the same each time
    path = tmp_path / "m.safetensors"
    toy([AMOUNT], [1.0], -5.0).with_header(metrics=result.metrics()).save(path)
    assert Checkpoint.load(path).header.metrics == result.metrics()
    assert result.metrics()["probe_violations"] == 0.0
