"""Reasons of alerts: the right code comes first if the cause is known."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.architecture import Architecture
from model.checkpoint import Amounts, Checkpoint, Header
from model.features.spec import FEATURES, INPUTS, FeatureSpec, Field, Input
from model.network import Network
from model.reasons import (
    EXPLAINED_AT_ONCE,
    REASONS,
    REASONS_MAX,
    Explainer,
    Reason,
    explain_log,
    reason_agreement,
    surprise_for_account,
    surprise_for_anyone,
    usual_range_text,
)
from model.training.sequences import score_stepwise

CODES = tuple(REASONS)
COLUMN = {name: place for place, name in enumerate(FEATURES)}
AMOUNTS = Amounts(tail=(0.0, 40.0, 70.0, 95.0, 120.0, 140.0, 160.0, 180.0, 200.0, 220.0, 400.0))
TYPICAL = {
    "amount": 40.0,
    "seconds_since_last": 20_000.0,
    "hour_of_day": 12.0,
    "day_of_week": 2.0,
    "transactions_seen": 100.0,
    "count_1d": 3.0,
    "count_7d": 15.0,
    "count_30d": 50.0,
    "mean_amount_1d": 40.0,
    "mean_amount_7d": 40.0,
    "mean_amount_30d": 40.0,
    "amount_to_mean": 1.0,
    "usual_amount": 40.0,
    "amount_to_usual": 1.0,
    "amount_to_least": 1.0,
    "merchant_count_1d": 2.0,
    "merchant_count_7d": 8.0,
    "merchant_count_30d": 30.0,
    "merchant_oldest_fraud_days": -1.0,
    "merchant_newest_fraud_days": -1.0,
    "merchant_legitimate_days": 8.0,
    "merchant_streak_days": -1.0,
}


def raw_of(**changes: float) -> NDArray[np.float32]:
    """Make an ordinary transaction [R] with some changed features."""
    values = TYPICAL | changes
    return np.array([values.get(name, 0.0) for name in FEATURES], np.float32)


def payment(amount: float, usual: float) -> NDArray[np.float32]:
    means = dict.fromkeys(("mean_amount_1d", "mean_amount_7d", "mean_amount_30d"), usual)
    ratio = amount / usual
    return raw_of(
        amount=amount, usual_amount=usual, amount_to_mean=ratio, amount_to_usual=ratio, **means
    )


def additive(weights: dict[tuple[str, str], float], hidden_weight: float = 0.0) -> Checkpoint:
    """Make a network whose logit is a sum of inputs and of the first hidden number.

    The part of known frauds counts only if a fraud is known.

    Args:
        weights: weights by feature and transform; over 0 for amounts and frauds.
        hidden_weight: weight of the first hidden number.
    """
    inputs = tuple(
        msgspec.structs.replace(
            i, mean=float(np.log1p(max(TYPICAL.get(i.feature, 0.0), 0.0) / i.unit))
        )
        if i.transform == "log1p"
        else i
        for i in INPUTS
    )
    spec = FeatureSpec(inputs)
    n = len(inputs)
    architecture = Architecture(n, n * 2, 4, head_size=1, dropout=0.0, roles=spec.roles)
    network = Network(architecture)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.free_layer.weight[:n] = torch.eye(n)
        network.free_layer.weight[n:] = -torch.eye(n)  # ReLU(x) - ReLU(-x) = x
        network.head.bias[0] = 100.0  # never below 0
        network.head.bias[1] = 100.0  # the first unit that rises with the amount
        network.logit.weight.fill_(1.0)
        network.amount_logit.weight[0, 0] = 1.0
        network.fraud_logit.weight[0, 0] = 1.0
        network.logit.bias.fill_(-200.0)
        keep_hidden(network)
        network.head.weight[0, 0] = hidden_weight
        for place, i in enumerate(inputs):
            weight = weights.get((i.feature, i.transform), 0.0) if i.at_most is None else 0.0
            network.head.weight[0, 4 + place] = weight
            network.head.weight[0, 4 + n + place] = -weight
            network.amount_layer.weight[0, place] = weight
            network.fraud_layer.weight[0, place] = weight * (i.role not in ("amount", "own"))
    header = Header(architecture=architecture, features=spec, amounts=AMOUNTS)
    return Checkpoint.of(network, header)


def keep_hidden(network: Network) -> None:
    """Set the gate z to 1, so that a transaction leaves the hidden state of size 4 unchanged."""
    bias = network.get_parameter("recurrent.bias_ih_l0")
    bias[4:8] = 20.0


def hidden(value: float = 0.0, n: int = 1) -> NDArray[np.float16]:
    return np.full((n, 1, 4), value, np.float16)


def explain(
    checkpoint: Checkpoint, raw: NDArray[np.float32], before: float = 0.0
) -> dict[str, float]:
    (reasons,) = Explainer(checkpoint).explain(raw[None], hidden(before))
    return {reason.code: reason.weight for reason in reasons}


@pytest.mark.parametrize(
    ("weights", "changes", "code"),
    [
        (
            {("merchant_risk_7d", "linear"): 5.0},
            {"merchant_risk_7d": 0.6, "merchant_known_frauds": 1.0},
            "merchant_risky",
        ),
        (
            {("merchant_streak_days", "linear"): 1.0},
            {"merchant_streak_days": 4.0, "merchant_known_frauds": 2.0},
            "merchant_risky",
        ),
        ({("merchant_count_30d", "log1p"): -1.0}, {"merchant_count_30d": 0.0}, "new_merchant"),
        (
            {("seconds_since_last", "log1p"): -1.0},
            {"seconds_since_last": 5.0},
            "velocity",
        ),
        ({("count_1d", "log1p"): 1.0}, {"count_1d": 30.0}, "velocity"),
        ({("hour_of_day", "sin"): 1.0}, {"hour_of_day": 6.0}, "time"),
    ],
)
def test_the_group_that_raises_the_score_is_the_reason(
    weights: dict[tuple[str, str], float], changes: dict[str, float], code: str
) -> None:
    assert explain(additive(weights), raw_of(**changes)) == {code: 1.0}


def test_the_contribution_of_the_hidden_state_is_the_history() -> None:
    assert explain(additive({}, hidden_weight=2.0), raw_of(), before=1.0) == {"history": 1.0}


@pytest.mark.parametrize(
    ("amount", "usual", "first"),
    [
        (230.0, 95.0, "amount_high"),  # 2.4 times the usual amount; rarer among all accounts
        (60.0, 10.0, "amount_unusual"),  # ordinary among all accounts, six times the usual amount
        (500.0, 80.0, "amount_unusual"),
        (900.0, 500.0, "amount_high"),
    ],
)
def test_an_amount_is_high_or_unusual_by_which_is_the_greater_surprise(
    amount: float, usual: float, first: str
) -> None:
    checkpoint = additive({("amount", "log1p"): 2.0})

    reasons = explain(checkpoint, payment(amount, usual))

    assert next(iter(reasons)) == first
    assert reasons.keys() <= {"amount_high", "amount_unusual"}


def test_an_account_s_first_amount_is_compared_with_all_accounts() -> None:
    """It has no usual amount yet, so only the rarity among all accounts counts."""
    raw = payment(400.0, 40.0)  # the usual amount of all accounts
    raw[COLUMN["transactions_seen"]] = 1.0

    reasons = explain(additive({("amount", "log1p"): 2.0}), raw)

    assert next(iter(reasons)) == "amount_high"


def test_an_alert_says_what_the_account_usually_pays() -> None:
    explainer = Explainer(additive({("amount", "log1p"): 2.0}))
    raw = payment(500.0, 80.0)
    (reasons,) = explainer.explain(raw[None], hidden())
    details = {reason.code: reason.detail for reason in reasons}
    assert details.pop("amount_unusual") == "usually 24 to 136, this is 500"
    assert set(details.values()) <= {None}
    raw[COLUMN["transactions_seen"]] = 1.0  # nothing is usual yet
    (reasons,) = explainer.explain(raw[None], hidden())
    assert all(reason.detail is None for reason in reasons)


def test_weights_are_the_shares_of_what_the_logit_falls_by() -> None:
    checkpoint = additive({("count_1d", "log1p"): 1.0, ("merchant_risk_1d", "linear"): 1.0}, 1.0)
    raw = raw_of(  # falls of 1 and 0.5
        count_1d=4 * np.e - 1, merchant_risk_1d=0.5, merchant_known_frauds=1.0
    )

    reasons = explain(checkpoint, raw, before=0.5)

    assert next(iter(reasons)) == "velocity"
    assert reasons == pytest.approx(
        {"velocity": 0.5, "merchant_risky": 0.25, "history": 0.25}, abs=2e-3
    )


def test_a_reason_that_counts_for_little_is_left_out_and_one_there_always_is() -> None:
    checkpoint = additive({("count_1d", "log1p"): 1.0, ("merchant_risk_1d", "linear"): 0.02})

    raw = raw_of(count_1d=30.0, merchant_risk_1d=1.0, merchant_known_frauds=1.0)
    assert explain(checkpoint, raw) == {"velocity": 1.0}
    assert len(explain(additive({}), raw_of())) == 1


@pytest.mark.parametrize(
    ("code", "effect", "expected"),
    [(0, {0: 3.0}, "new_merchant"), (2, {2: 3.0}, "merchant_risky"), (1, {1: 3.0}, "history")],
)
def test_a_category_is_rare_or_risky_against_the_commonest(
    code: int, effect: dict[int, float], expected: str
) -> None:
    """Code 0 is unknown or rare, and code 1 the most frequent category."""
    architecture = Architecture(
        1, 2, 4, head_size=1, dropout=0.0, embeddings=((4, 1),), roles=("amount",)
    )
    network = Network(architecture)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for place, value in effect.items():
            network.get_parameter("embeddings.0.weight")[place] = value
        network.free_layer.weight[0, 1] = 1.0
        network.head.weight[0, 4] = 1.0
        network.head.weight[0, 0] = 0.1  # a small part of the hidden state
        network.logit.weight.fill_(1.0)
        keep_hidden(network)
    spec = FeatureSpec(
        (Input("amount", "log1p"), Input("category", "category")),
        fields=(Field("category", "categorical", ("a", "b", "c")),),
    )
    checkpoint = Checkpoint.of(network, Header(architecture=architecture, features=spec))

    (reasons,) = Explainer(checkpoint).explain(
        np.append(raw_of(), np.float32(code))[None], hidden(1.0)
    )

    assert reasons[0].code == expected


@cache
def random_checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    spec = FeatureSpec().fitted(raws(200, seed=1))
    architecture = Architecture(len(INPUTS), 8, 4, head_size=8, roles=spec.roles)
    return Checkpoint.of(
        Network(architecture), Header(architecture=architecture, features=spec, amounts=AMOUNTS)
    )


def raws(n: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return np.stack([raw_of() for _ in range(n)]) * rng.gamma(1.0, 1.0, (n, 1)).astype(np.float32)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_reasons_are_few_and_known_and_their_weights_positive_with_sum_one(
    seed: int, n: int
) -> None:
    raw = raws(n, seed)
    before = np.random.default_rng(seed).normal(size=(n, 1, 4)).astype(np.float16)
    explainer = Explainer(random_checkpoint())

    found = explainer.explain(raw, before)

    assert found == explainer.explain(raw, before), "the same again"
    assert len(found) == n
    for reasons in found:
        codes = [reason.code for reason in reasons]
        weights = [reason.weight for reason in reasons]
        assert 1 <= len(codes) == len(set(codes)) <= REASONS_MAX
        assert set(codes) <= set(CODES)
        assert min(weights) > 0
        assert sum(weights) == pytest.approx(1.0)
        assert weights[0] >= max(weights) - 0.002, "the weightiest first, but for rounding"


def test_many_are_explained_in_parts_as_alone() -> None:
    raw = raws(EXPLAINED_AT_ONCE + 3, seed=3)
    before = hidden(0.5, len(raw))
    explainer = Explainer(random_checkpoint())

    together = explainer.explain(raw, before)

    assert explainer.explain(raw[:0], before[:0]) == []
    for i in (0, EXPLAINED_AT_ONCE - 1, EXPLAINED_AT_ONCE, len(raw) - 1):
        (alone,) = explainer.explain(raw[i : i + 1], before[i : i + 1])
        assert dict_of(alone) == pytest.approx(dict_of(together[i]), abs=0.005)


def dict_of(reasons: list[Reason]) -> dict[str, float]:
    return {reason.code: reason.weight for reason in reasons}


def test_a_missing_number_in_an_extra_field_does_no_harm() -> None:
    architecture = Architecture(2, 2, 4, head_size=2, roles=("amount", "own"))
    spec = FeatureSpec(
        (Input("amount", "log1p"), Input("age", "linear")), fields=(Field("age", "numeric"),)
    )
    torch.manual_seed(0)
    checkpoint = Checkpoint.of(
        Network(architecture), Header(architecture=architecture, features=spec)
    )

    (reasons,) = Explainer(checkpoint).explain(
        np.append(payment(500.0, 20.0), np.float32(np.nan))[None], hidden()
    )

    assert sum(reason.weight for reason in reasons) == pytest.approx(1.0)


def test_reasons_of_a_log_are_those_of_its_states() -> None:
    rng = np.random.default_rng(0)
    n = 60
    account = rng.integers(0, 4, n)
    amount = rng.gamma(2.0, 30.0, n)
    timestamp_ms = np.arange(n, dtype=np.int64) * 3_600_000
    checkpoint = random_checkpoint()
    raw = raws(n, seed=5)
    chosen = rng.random(n) < 0.3

    found = explain_log(checkpoint, account, raw, chosen)

    assert len(found) == chosen.sum()
    first = np.flatnonzero(chosen)[0]
    earlier = np.flatnonzero(account[:first] == account[first])
    state: NDArray[np.floating] = checkpoint.stepper.empty_hidden(1)
    for row in earlier:
        inputs = checkpoint.encode(raw[row : row + 1])
        state = checkpoint.stepper.step(inputs, state)[1].astype(np.float16)
    (alone,) = Explainer(checkpoint).explain(raw[first : first + 1], state)
    assert dict_of(alone) == pytest.approx(dict_of(found[0]), abs=0.01)
    assert len(score_stepwise(checkpoint, account, amount, timestamp_ms)[0]) == n


def test_surprises_rise_with_the_amount() -> None:
    amount = np.linspace(1.0, 2000.0, 500)
    for surprise in (
        surprise_for_anyone(amount, np.array(AMOUNTS.tail)),
        surprise_for_account(amount, np.full(500, 50.0), 0.5),
    ):
        assert (np.diff(surprise) >= 0).all()
        assert np.isfinite(surprise).all()
    assert surprise_for_anyone(np.array([220.0]), np.array(AMOUNTS.tail)) == pytest.approx(
        9 * np.log(2)
    )


def test_amounts_say_what_share_of_payments_is_as_high() -> None:
    rng = np.random.default_rng(0)
    amount = rng.gamma(2.0, 30.0, 5000)
    amounts = Amounts.of(amount, np.clip(rng.normal(1.0, 0.4, 5000), 0, None))

    for halvings, value in enumerate(amounts.tail[:8]):
        assert (amount >= value).mean() == pytest.approx(0.5**halvings, rel=0.1)
    assert amounts.deviation == pytest.approx(0.4, abs=0.02)
    assert Amounts.of(amount[:0], amount[:0]) == Amounts()


def test_without_the_spread_of_amounts_the_scale_of_inputs_decides_what_is_high() -> None:
    torch.manual_seed(0)
    architecture = Architecture(1, 2, 4, head_size=1, roles=("amount",))
    spec = FeatureSpec((Input("amount", "log1p", mean=3.5, deviation=1.0),))
    checkpoint = Checkpoint.of(
        Network(architecture), Header(architecture=architecture, features=spec)
    )
    falls = Explainer(checkpoint).falls(np.stack([payment(5000.0, 4000.0)]), hidden())[0]

    high, unusual = falls[CODES.index("amount_high")], falls[CODES.index("amount_unusual")]
    assert abs(high) > abs(unusual)


def test_every_code_is_explained_to_people_with_the_same_words() -> None:
    page = (Path(__file__).parents[2] / "docs/messages.md").read_text()

    for code, text in REASONS.items():
        assert f"| `{code}` | {text} |" in page


def test_agreement_is_counted_by_scenario() -> None:
    first = ["amount_high", "amount_unusual", "merchant_risky", "time", "amount_unusual"]
    scenario = np.array([1, 1, 2, 0, 3])

    assert reason_agreement(first, scenario) == {1: 0.5, 2: 1.0, 3: 1.0}


def test_an_unusual_amount_says_what_is_usual_for_the_account() -> None:
    assert usual_range_text(40.0, 0.36, 412.0) == "usually 20 to 60, this is 412"
    assert usual_range_text(2.0, 0.5, 9.5) == "usually 0.60 to 3.40, this is 9.50"
    assert usual_range_text(1000.0, 1.0, 25_000.0) == "usually 0 to 2,397, this is 25,000"
    encoded = msgspec.json.encode([Reason("amount_unusual", 0.7, "usually 1"), Reason("time", 0.3)])
    assert msgspec.json.decode(encoded) == [
        {"code": "amount_unusual", "weight": 0.7, "detail": "usually 1"},
        {"code": "time", "weight": 0.3},
    ]
