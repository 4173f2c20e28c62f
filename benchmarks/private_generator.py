"""Measure a generator whose network is trained with differential privacy, by account.

In an environment of its own:

    python -m venv private && private/bin/pip install '.[evaluate]' opacus==1.6.0
    private/bin/python -m benchmarks.private_generator transactions.parquet handbook --epsilon 8

Opacus clips the gradient of each account, adds noise and accounts for it (RDP, delta 1e-5). Tables,
quantiles and the density of profiles stay without noise, which favours the measure: a generator
that is private as a whole can only be worse. An epsilon of 0 means no noise.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Dataset
from model.evaluation.discriminators import discriminate
from model.evaluation.history_views import histories_of
from model.evaluation.lightgbm_reference import fit_boosted
from model.evaluation.likelihood_attack import history_loss
from model.evaluation.windows import window_inputs
from model.generator.fields import measure_fields
from model.generator.lessons import COLUMNS, Lessons, make_lessons
from model.generator.network import GeneratorNetwork
from model.generator.settings import GeneratorSettings
from model.generator.stream import HistoryStream, Wish, generated_dataset
from model.generator.train import HEAD_WEIGHT_DECAY, accounts_of, train_generator
from model.generator.world import measure
from model.metrics import average_precision
from model.torch_threads import one_thread
from pipeline.files.column_mapping import load_mapping
from pipeline.files.training_data import FileData

Int64 = NDArray[np.int64]

DELTA = 1e-5
DECAYED = ("time.weight", "slot.weight", "slot_weekday", "merchant.weight")
TREES = 150
RISE_SHARE = 0.05
KEPT_SHARE = 0.9
"""Share of the mean of earlier weights; the mean averages the noise out."""
COMPARED_MAX = 1000
TRAINED_FROM_DAY, TESTED_FROM_DAY = 14, 98


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a private training."""

    epochs: int
    batch: int
    clip: float
    rate: float
    seed: int


def opacus(module: str) -> Any:
    """Return a module of Opacus."""
    try:
        return importlib.import_module(f"opacus.{module}")
    except ImportError as error:
        raise SystemExit(f"{error}: install opacus as {Path(__file__)} says") from error


def gradients_of(network: GeneratorNetwork, lessons: Lessons, accounts: Int64) -> None:
    """Hand the gradient of each account's loss to Opacus."""
    scale = float(lessons.length.mean())
    found: dict[str, list[Tensor]] = {name: [] for name, _ in network.named_parameters()}
    for account in accounts.tolist():
        rows = slice(lessons.start[account], lessons.start[account] + lessons.length[account])
        states, _ = network(torch.from_numpy(lessons.inputs[rows])[None], None)
        network.zero_grad()
        loss = history_loss(network, lessons, account, states[0]) / scale
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters():
            found[name].append(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    for name, parameter in network.named_parameters():
        vars(parameter)["grad_sample"] = torch.stack(found[name])


def begin_at_marginals(network: GeneratorNetwork, lessons: Lessons) -> None:
    """Begin the heads of fraud and amount at the data's shares, as the others begin at tables."""
    targets = lessons.targets[lessons.targets[:, 0] >= 0]
    amount, fraud = (targets[:, COLUMNS.index(name)] for name in ("amount", "fraud"))
    count = np.bincount(amount, minlength=network.amount.out_features) + 1.0
    share = (np.sum(fraud == 1) + 1) / (np.sum(fraud >= 0) + 2)
    with torch.no_grad():
        network.amount.weight.mul_(0.1)
        network.fraud.weight.mul_(0.1)
        network.amount.bias.copy_(torch.from_numpy(np.log(count / count.sum())))
        network.fraud.bias.fill_(math.log(share / (1 - share)))


def train_privately(
    network: GeneratorNetwork, lessons: Lessons, epsilon: float, plan: Plan
) -> float:
    """Train the network; return the noise relative to the clipping norm."""
    begin_at_marginals(network, lessons)
    accounts = len(lessons.length)
    share, updates = plan.batch / accounts, math.ceil(plan.epochs * accounts / plan.batch)
    noise = 0.0
    if epsilon:
        noise = opacus("accountants.utils").get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=DELTA,
            sample_rate=share,
            steps=updates,
            accountant="rdp",
        )
    named = dict(network.named_parameters())
    groups = [
        {
            "params": [value for name, value in named.items() if (name in DECAYED) == decayed],
            "weight_decay": HEAD_WEIGHT_DECAY * decayed,
        }
        for decayed in (False, True)
    ]
    optimizer = opacus("optimizers").DPOptimizer(
        torch.optim.AdamW(groups, plan.rate, (0.9, 0.99)),
        noise_multiplier=noise,
        max_grad_norm=plan.clip,
        expected_batch_size=plan.batch,
    )
    rng = np.random.default_rng(plan.seed)
    mean = {name: value.clone() for name, value in network.state_dict().items()}
    for update in range(updates):
        done = update / updates
        rise = min(1.0, done / RISE_SHARE + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * rise * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        chosen = np.flatnonzero(rng.random(accounts) < share)  # Poisson, as accounted for
        gradients_of(network, lessons, chosen)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in network.state_dict().items():
            mean[name].lerp_(value, 1 - KEPT_SHARE)
    network.load_state_dict(mean)
    return noise


def precision_on(log: Dataset, others: Dataset, seed: int) -> float:
    """Return the average precision on other accounts of LightGBM trained on a log."""
    rows, tested = log.day >= TRAINED_FROM_DAY, others.day >= TESTED_FROM_DAY
    inputs = window_inputs(log)[rows]
    trees, _ = fit_boosted(inputs, log.is_fraud[rows], seed, trees=TREES)
    return average_precision(trees.score(window_inputs(others)[tested]), others.is_fraud[tested])


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("columns")
@click.option("--accounts", default=1000, show_default=True, help="accounts that train")
@click.option("--epsilon", default=8.0, show_default=True, help="0: clipping without noise")
@click.option("--epochs", default=20, show_default=True)
@click.option("--batch", default=256, show_default=True, help="accounts of an update, on average")
@click.option("--clip", default=0.1, show_default=True, help="norm of an account's gradient")
@click.option("--rate", default=8e-3, show_default=True, help="learning rate")
@click.option("--seed", default=1, show_default=True)
def main(file: Path, columns: str, accounts: int, epsilon: float, seed: int, **plan: Any) -> None:
    """Train a network privately on accounts of FILE and compare its histories with others."""
    with tempfile.TemporaryDirectory() as work:
        log = FileData(file, load_mapping(columns)).write(Path(work) / "data", lambda *_: None)
    chosen = np.random.default_rng(seed).permutation(np.unique(log.account))
    members = accounts_of(log, chosen[:accounts])
    others = accounts_of(log, chosen[accounts : accounts + COMPARED_MAX])
    settings = GeneratorSettings(epochs=1, seed=seed, transactions_max=10_000_000)
    public = train_generator(members, settings)  # its tables and density stay
    extra = measure_fields(members)
    measured = measure(members, seed, extra.group, extra.groups)
    sizes = public.header.sizes
    lessons = make_lessons(members, measured, extra.classes[:, extra.own], sizes.fields)
    began = time.monotonic()
    with one_thread():
        torch.manual_seed(seed)
        network = GeneratorNetwork(sizes)
        noise = train_privately(network, lessons, epsilon, Plan(seed=seed, **plan))
    print(f"epsilon {epsilon:g}: noise {noise:.2f}, {time.monotonic() - began:.0f} s of training")
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    private = dataclasses.replace(public, weights=weights)
    whole = generated_dataset(HistoryStream(private, Wish(accounts, int(log.day[-1]) + 1, seed)))
    there = np.random.default_rng(seed).permutation(np.unique(whole.account))
    made = accounts_of(whole, there[: int(others.account.max()) + 1])
    found = discriminate(histories_of(others), histories_of(made), seed)
    print(f"AUC {found.gru:.3f} (GRU), {found.lightgbm:.3f} (LightGBM): {found.telling[:3]}")
    for name, trained in (("real", members), ("generated", made)):
        print(f"average precision, trained on {name}: {precision_on(trained, others, seed):.3f}")


if __name__ == "__main__":
    main()
