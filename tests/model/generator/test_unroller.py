"""The network in NumPy computes what the network in PyTorch computes, in batches of any size."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.generator.lessons import AT_COLUMN, make_lessons
from model.generator.memory import FRAUD_STATES, TIME_INPUTS
from model.generator.network import GeneratorNetwork
from model.generator.sizes import FRAUD_CLASSES, GeneratorSizes
from model.generator.stream import HistoryStream, Wish
from model.generator.train import accounts_of
from model.generator.unroller import GeneratedTransactions, NumpyNetwork, Unroller, choose, padded
from tests.model.generator.small_generator import log_with_fields, small_generator

STEPS = 40


def test_the_unrolled_network_equals_the_network_step_by_step() -> None:
    generator = small_generator()
    sizes = generator.header.sizes
    network = GeneratorNetwork(sizes)
    network.load_state_dict({n: torch.from_numpy(w) for n, w in generator.weights.items()})
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(9, STEPS, sizes.inputs)).astype(np.float32)
    with torch.inference_mode():
        states, _ = network(torch.from_numpy(inputs), None)
        targets = torch.from_numpy(_targets(rng, 9, sizes))
        time_inputs = torch.from_numpy(rng.normal(size=(9, TIME_INPUTS)).astype(np.float32))
        heads, fields = network.logits(states[:, -1], time_inputs, targets)

    stepwise = NumpyNetwork(sizes, generator.weights)
    hidden = padded(np.zeros((9, sizes.hidden), np.float32))
    for step in range(STEPS):
        hidden = stepwise.step(padded(inputs[:, step]), hidden)
        np.testing.assert_allclose(hidden[:9], states[:, step].numpy(), atol=1e-5)

    column = {name: targets[:, place].numpy() for name, place in AT_COLUMN.items()}
    logits = stepwise.product("time.weight", hidden, "time.bias")[:9]
    logits += stepwise.table("time_state")[column["state"]]
    np.testing.assert_allclose(logits, heads["time"].numpy(), atol=1e-5)
    z = stepwise.product("known_hidden.weight", hidden, "known_hidden.bias")
    z += stepwise.product("known_time.weight", padded(time_inputs.numpy()))
    z = np.maximum(z, 0)
    odds = stepwise.product("fraud.weight", z, "fraud.bias")[:9, 0]
    odds += stepwise.table("fraud_state")[column["state_now"]]
    odds += stepwise.table("fraud_slot")[column["slot_now"]]
    odds += stepwise.table("fraud_rate") * time_inputs.numpy()[:, -1]
    np.testing.assert_allclose(odds, heads["fraud"].numpy(), atol=1e-5)
    merchant = stepwise.product("merchant.weight", z, "merchant.bias")[:9]
    merchant += stepwise.table("merchant_fraud") * (column["class"] == 1)[:, None]
    np.testing.assert_allclose(merchant, heads["merchant"].numpy(), atol=1e-5)
    y = stepwise.product("spent.weight", z, "spent.bias")
    for table, name in (
        ("spent_fraud", "class"),
        ("spent_merchant", "merchant"),
        ("spent_group", "group"),
    ):
        y[:9] += stepwise.table(table)[column[name]]
    y = np.maximum(y, 0)
    amount = stepwise.product("amount.weight", y, "amount.bias")[:9]
    cell = column["class"] * sizes.groups + column["group"]
    amount += stepwise.table("amount_group")[cell]
    np.testing.assert_allclose(amount, heads["amount"].numpy(), atol=1e-5)
    assert len(fields) == 1
    channel = stepwise.product("field_0.weight", y, "field_0.bias")[:9]
    channel += stepwise.table("field_0_amount")[column["amount"]]
    np.testing.assert_allclose(channel, fields[0].numpy(), atol=1e-5)


def test_rows_at_once_and_threads_leave_no_trace() -> None:
    generator, wish = small_generator(), Wish(accounts=60, days=20, seed=4)
    one = _all(HistoryStream(generator, wish, threads=1))
    three = _all(HistoryStream(generator, wish, threads=3))
    stream = HistoryStream(generator, wish)
    unroller: Unroller = stream._unroller(np.arange(60))
    parts = GeneratedTransactions.joined(unroller.until(stream._cast.end_ms, rows_at_once=7))
    few = parts.at(np.lexsort((parts.account, parts.time_ms)))

    for name, column in vars(one).items():
        np.testing.assert_array_equal(column, getattr(three, name))
        np.testing.assert_array_equal(column, getattr(few, name))


def test_the_first_accounts_histories_do_not_depend_on_when_they_end() -> None:
    generator = small_generator()
    short = _all(HistoryStream(generator, Wish(accounts=30, days=10, seed=4)))
    long = _all(HistoryStream(generator, Wish(accounts=30, days=15, seed=4)))

    # Only when accounts open and merchants are compromised follows from the length.
    assert 0.5 < len(short) / max(1, (long.time_ms < short.time_ms.max()).sum()) < 2


def test_generation_meets_the_inputs_that_training_has_seen() -> None:
    from model.generator.fields import measure_fields
    from model.generator.world import measure

    log = accounts_of(log_with_fields(), np.unique(log_with_fields().account))
    extra = measure_fields(log)
    measured = measure(log, 1, extra.group, extra.groups)
    sizes = [extra.fields[place].classes for place in extra.own]
    lessons = make_lessons(log, measured, extra.classes[:, extra.own], sizes)

    steps = int(lessons.length.sum())
    assert steps == len(log) + len(np.unique(log.account))
    assert np.isfinite(lessons.inputs).all()
    # Each chosen class was possible for the simple model: no target has probability 0.
    going = lessons.targets[:, 0] >= 0
    at = np.flatnonzero(going)
    assert (lessons.time_base[at, lessons.targets[at, 0]] > -1e3).all()
    assert (lessons.merchant_base[at, lessons.targets[at, 5]] > -1e3).all()
    slots = np.flatnonzero(lessons.targets[:, 1] >= 0)
    slots = slots[going[slots]]
    assert (lessons.slot_base[slots, lessons.targets[slots, 1]] > -1e3).all()


def test_an_impossible_class_is_never_drawn() -> None:
    logits = np.full((1000, 3), -1e4, np.float32)
    logits[:, 1] = 0.0
    shares = np.linspace(0, np.nextafter(1, 0), 1000)

    assert set(choose(logits, shares).tolist()) == {1}


def _targets(rng: np.random.Generator, count: int, sizes: GeneratorSizes) -> NDArray[np.int64]:
    most = dict.fromkeys(AT_COLUMN, 2)
    most |= {"class": FRAUD_CLASSES, "group": sizes.groups, "amount": sizes.amounts}
    most |= {"merchant": sizes.merchants, "state": FRAUD_STATES, "state_now": FRAUD_STATES}
    return np.stack([rng.integers(0, most[name], count) for name in AT_COLUMN], 1)


def _all(stream: HistoryStream) -> GeneratedTransactions:
    return GeneratedTransactions.joined(list(stream.parts()))
