"""The network in NumPy computes what the network in PyTorch computes, in batches of any size."""

from __future__ import annotations

import numpy as np
import torch

from model.generator.lessons import make_lessons
from model.generator.network import GeneratorNetwork
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
        targets = torch.zeros((9, 8), dtype=torch.long)
        time_inputs = torch.from_numpy(rng.normal(size=(9, 17)).astype(np.float32))
        heads, fields = network.logits(states[:, -1], time_inputs, targets)

    stepwise = NumpyNetwork(sizes, generator.weights)
    hidden = padded(np.zeros((9, sizes.hidden), np.float32))
    for step in range(STEPS):
        hidden = stepwise.step(padded(inputs[:, step]), hidden)
        np.testing.assert_allclose(hidden[:9], states[:, step].numpy(), atol=1e-5)

    logits = stepwise.product("time.weight", hidden, "time.bias")[:9]
    np.testing.assert_allclose(logits, heads["time"].numpy(), atol=1e-5)
    z = stepwise.product("known_hidden.weight", hidden, "known_hidden.bias")
    z += stepwise.product("known_time.weight", padded(time_inputs.numpy()))
    z = np.maximum(z, 0)
    merchant = stepwise.product("merchant.weight", z, "merchant.bias")[:9]
    merchant += stepwise.table("merchant_fraud")[0]
    np.testing.assert_allclose(merchant, heads["merchant"].numpy(), atol=1e-5)
    y = stepwise.product("spent.weight", z, "spent.bias")
    y = np.maximum(y + stepwise.table("spent_fraud")[0] + stepwise.table("spent_merchant")[0], 0)
    amount = stepwise.product("amount.weight", y, "amount.bias")[:9]
    np.testing.assert_allclose(amount, heads["amount"].numpy(), atol=1e-5)
    assert len(fields) == 1
    channel = stepwise.product("field_0.weight", y, "field_0.bias")[:9]
    channel += stepwise.table("field_0_amount")[0]
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
    measured = measure(log, 1)
    fields, classes = measure_fields(log)
    own = [place for place, field in enumerate(fields) if field.owner == "transaction"]
    lessons = make_lessons(log, measured, classes[:, own], [fields[p].classes for p in own])

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


def _all(stream: HistoryStream) -> GeneratedTransactions:
    return GeneratedTransactions.joined(list(stream.parts()))
