"""The shapes of a recurrent network: unrolled at once, and one transaction at a time.

python -m tests.model.shapes    # prints the largest differences (docs/recurrent.md)

Histories are simulated. All of them have the same length, so no difference comes from padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
import torch
from safetensors import safe_open

from model.checkpoint import Checkpoint
from model.forecast.decoder import Decoder
from model.forecast.inputs import day_inputs
from model.forecast.network import ForecastNetwork
from model.forecast.shape import DAYS_MAX
from model.generator.network import GeneratorNetwork
from model.generator.sizes import GeneratorSizes
from model.generator.unroller import NumpyNetwork, padded
from model.network import Network
from model.stepper import Float32, Stepper, sigmoid
from model.training.sequences import Sequences
from model.training.settings import TrainingSettings
from pipeline.files.generated_stream import SHIPPED_GENERATOR
from pipeline.settings import SHIPPED_CHECKPOINT
from tests.model.simulated_log import observe_all, simulate

ACCOUNTS = 40
STEPS = 200
CHUNK_STEPS = 64
SIMULATED = TrainingSettings(customers=300, terminals=600, days=120, seed=17)


class _GeneratorHeader(msgspec.Struct):
    sizes: GeneratorSizes


@dataclass(frozen=True)
class Run:
    """Scores [n, T] and hidden states [n, L, H] after the last of T transactions."""

    scores: Float32
    hidden: Float32


@cache
def shipped() -> Checkpoint:
    """Load the shipped checkpoint."""
    return Checkpoint.load(SHIPPED_CHECKPOINT)


@cache
def histories() -> Float32:
    """Return the inputs [n, T, I] of simulated accounts, as the shipped network takes them."""
    log = simulate(SIMULATED)
    inputs = shipped().encode(observe_all(log, shipped().header.features))
    sequences = Sequences(log.account)
    long = np.flatnonzero(sequences.length >= STEPS)[:ACCOUNTS]
    assert len(long) == ACCOUNTS
    positions = sequences.start[long][:, None] + np.arange(STEPS)
    long_ones: Float32 = inputs[sequences.row[positions]]
    return long_ones


def network_like_the_shipped(**sizes: object) -> Network:
    """Make a network with the shipped one's sizes, except some, and random weights."""
    torch.manual_seed(5)
    architecture = dataclasses.replace(shipped().header.architecture, **sizes)  # type: ignore[arg-type]
    return Network(architecture).eval().requires_grad_(False)


def unrolled(network: Network, inputs: Float32, chunk_steps: int = STEPS) -> Run:
    """Run histories at once, or in chunks that pass the hidden state on."""
    scores, hidden = [], None
    with torch.inference_mode():
        for begin in range(0, inputs.shape[1], chunk_steps):
            chunk = torch.from_numpy(inputs[:, begin : begin + chunk_steps])
            logits, hidden = network.unroll(chunk, hidden)
            scores.append(torch.sigmoid(logits).numpy())
    assert hidden is not None
    return Run(np.concatenate(scores, axis=1), hidden.numpy())


def stepwise(stepper: Stepper, inputs: Float32, stored: type[np.floating] = np.float32) -> Run:
    """Run histories one transaction at a time; hidden states are stored as ``stored`` between."""
    hidden, scores = stepper.empty_hidden(len(inputs)), []
    for step in range(inputs.shape[1]):
        logits, after = stepper.step(inputs[:, step], hidden)
        hidden = after.astype(stored).astype(np.float32)
        scores.append(sigmoid(logits))
    return Run(np.stack(scores, axis=1), hidden)


def largest(a: Float32, b: Float32) -> float:
    """Return the largest difference."""
    return float(np.abs(a - b).max())


def in_step() -> float:
    """Many to many in step: the scores of all transactions."""
    inputs = histories()
    whole, steps = unrolled(shipped().network, inputs), stepwise(shipped().stepper, inputs)
    return largest(whole.scores, steps.scores)


def states() -> float:
    """The recurrence: hidden states after the last transaction."""
    inputs = histories()
    whole, steps = unrolled(shipped().network, inputs), stepwise(shipped().stepper, inputs)
    return largest(whole.hidden, steps.hidden)


def chunks() -> float:
    """Chunks of training: scores and states, with the state passed from chunk to chunk."""
    inputs = histories()
    whole = unrolled(shipped().network, inputs)
    parts = unrolled(shipped().network, inputs, CHUNK_STEPS)
    return max(largest(whole.scores, parts.scores), largest(whole.hidden, parts.hidden))


def one_to_one() -> float:
    """One to one: the scores of whole histories, and of each transaction alone."""
    network, inputs = network_like_the_shipped(cell="none"), histories()
    alone = inputs.reshape(-1, 1, inputs.shape[2])
    one = unrolled(network, alone, 1).scores.reshape(inputs.shape[:2])
    return largest(unrolled(network, inputs).scores, one)


def many_to_one() -> float:
    """Many to one: the account's standing after whole histories."""
    inputs = histories()
    whole, steps = unrolled(shipped().network, inputs), stepwise(shipped().stepper, inputs)
    with torch.inference_mode():
        standing = torch.sigmoid(shipped().network.account_logit(torch.from_numpy(whole.hidden)))
    return largest(standing.numpy(), sigmoid(shipped().stepper.account_logits(steps.hidden)))


def stack() -> float:
    """A stack of three layers: scores and the states of all layers."""
    network, inputs = network_like_the_shipped(layers=3), histories()
    whole = unrolled(network, inputs)
    steps = stepwise(Stepper(network.architecture, network.weights()), inputs)
    return max(largest(whole.scores, steps.scores), largest(whole.hidden, steps.hidden))


def one_to_many() -> float:
    """One to many: the generator's states, with the sizes of the shipped one."""
    with safe_open(SHIPPED_GENERATOR, "np") as file:
        sizes = msgspec.json.decode(file.metadata()["recur-generator"], type=_GeneratorHeader).sizes
    torch.manual_seed(7)
    network = GeneratorNetwork(sizes)
    inputs = np.random.default_rng(7).normal(size=(ACCOUNTS, STEPS, sizes.inputs))
    with torch.inference_mode():
        states, _ = network(torch.from_numpy(inputs.astype(np.float32)), None)
    steps = NumpyNetwork(sizes, {n: t.numpy() for n, t in network.state_dict().items()})
    hidden, found = padded(np.zeros((ACCOUNTS, sizes.hidden), np.float32)), 0.0
    for step in range(STEPS):
        hidden = steps.step(padded(inputs[:, step].astype(np.float32)), hidden)
        found = max(found, largest(hidden[:ACCOUNTS], states[:, step].numpy()))
    return found


def forecast() -> float:
    """Many to many, unsynchronised: the shipped decoder's days, relative to values over 1."""
    shape, weights = shipped().header.forecast, shipped().forecast_weights
    assert shape is not None
    encoder = shipped().header.architecture.hidden_size
    network = ForecastNetwork(shape, encoder)
    named = {
        f"{name}_l0" if name.startswith("cell.") else name: value
        for name, value in weights.items()
        if not name.startswith("calibration.")
    }
    network.load_state_dict({name: torch.from_numpy(value) for name, value in named.items()})
    rng = np.random.default_rng(8)
    inputs = rng.uniform(-1, 1, (ACCOUNTS, shape.bookkeeping + encoder)).astype(np.float32)
    log_rate = rng.uniform(-2, 2, ACCOUNTS)
    first = np.full(ACCOUNTS, 17_700)
    calendar = np.stack([day_inputs(first, k) for k in range(DAYS_MAX)], axis=1)
    with torch.inference_mode():
        terms = network.unroll(
            torch.from_numpy(inputs),
            torch.from_numpy(log_rate.astype(np.float32)),
            torch.from_numpy(calendar),
        )
    decoder, found = Decoder(weights), 0.0
    context, state = decoder.start(inputs)
    for ahead in range(DAYS_MAX):
        day, state = decoder.step(context, state, calendar[:, ahead], log_rate, ahead == 0)
        for mine, its in (
            (np.log(day.mean), terms.log_mean), (np.log(day.dispersion), terms.log_dispersion),
            (day.amount, terms.amount.clamp(min=0)), (day.largest, terms.largest.clamp(min=0)),
            (day.fraud, terms.fraud),
        ):  # fmt: skip
            other = its[:, ahead].numpy()
            found = max(found, float((np.abs(mine - other) / (1 + np.abs(other))).max()))
    return found


def rounding() -> float:
    """Scores with states in float16 between the steps, and with states in float32."""
    inputs = histories()
    exact = stepwise(shipped().stepper, inputs)
    return largest(exact.scores, stepwise(shipped().stepper, inputs, np.float16).scores)


EQUAL: dict[str, Callable[[], float]] = {
    "recurrence: states": states,
    "chunks of training": chunks,
    "one to one": one_to_one,
    "many to one": many_to_one,
    "many to many, in step": in_step,
    "stack of three layers": stack,
    "one to many": one_to_many,
    "many to many, forecast": forecast,
}
"""Differences that are at most 1e-5."""


if __name__ == "__main__":
    for name, difference in EQUAL.items():
        print(f"{name:24} {difference():.1e}")
    print(f"{'float16 between steps':24} {rounding():.1e}")
