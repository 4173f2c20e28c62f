"""Training of a generator: labelled transactions in, a generator out.

data set -> sample of accounts -> world, profiles, fields -> lessons
         -> GRU, by truncated back-propagation through time -> generator
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import FRAUD, LEGITIMATE, Dataset
from model.generator.fields import measure_fields
from model.generator.generator import Generator, GeneratorHeader
from model.generator.lessons import Lessons, make_lessons
from model.generator.memory import input_size
from model.generator.network import GeneratorNetwork, losses
from model.generator.profiles import fit_density
from model.generator.settings import (
    ACCOUNTS_MIN,
    TRANSACTIONS_MIN,
    GeneratorError,
    GeneratorSettings,
)
from model.generator.sizes import GeneratorSizes
from model.generator.starting_tables import start_from, starting_tables
from model.generator.world import measure
from model.torch_threads import one_thread
from model.training.settings import Report, Reporter
from model.units import DAY_MS

LOSSES = ("time", "slot", "fraud", "merchant", "amount", "fields")

DAYS_MIN = 7
GRADIENT_NORM_MAX = 1.0
HEAD_WEIGHT_DECAY = 1.0
"""It pulls the heads with a simple model towards it: what is not in the data stays 0."""
_DECAYED = ("time.weight", "slot.weight", "slot_weekday", "merchant.weight", "merchant.bias")
_RISE_SHARE = 0.05
_LESSONS_SHARE = 0.1


def train_generator(
    log: Dataset, settings: GeneratorSettings, report: Reporter = lambda _: None
) -> Generator:
    """Train a generator on a data set.

    Args:
        log: the transactions.
        settings: the settings.
        report: called often, from this thread.

    Raises:
        GeneratorError: there are too few accounts, transactions or days, one class only, or the
            loss is no longer finite.
    """
    report(Report("measuring accounts", 0.0))
    log = sample_of(log, settings)
    check_data(log)
    extra = measure_fields(log)
    fields, own = extra.fields, extra.own
    measured = measure(log, settings.seed, extra.group, extra.groups)
    sizes = GeneratorSizes(
        inputs=input_size(len(own), extra.groups),
        hidden=settings.hidden_size,
        head=settings.head_size,
        amounts=len(measured.world.ratio_edges) - 1,
        groups=extra.groups,
        fields=[fields[place].classes for place in own],
    )
    lessons = make_lessons(
        log,
        measured,
        extra.classes[:, own],
        sizes.fields,
        lambda share: report(Report("replaying histories", _LESSONS_SHARE * share)),
    )
    network, found = _fit(sizes, lessons, settings, report)
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    mark = hashlib.sha256(f"{log.digest()} {settings.seed}".encode()).hexdigest()[:8]
    header = GeneratorHeader(
        sizes=sizes,
        fields=fields,
        currency=log.currency,
        start_ms=int(log.timestamp_ms[0]) // DAY_MS * DAY_MS,
        id_mark=f"G{mark}",
        training={
            **dataclasses.asdict(settings),
            "transactions": len(log),
            "accounts": len(measured.profiles),
            "losses": dict(zip(LOSSES, found, strict=True)),
        },
    )
    density = fit_density(measured.profiles, settings.seed)
    report(Report("done", 1.0))
    return Generator(header, weights, measured.world, density)


def check_data(log: Dataset) -> None:
    """Reject data that a generator cannot learn from.

    Raises:
        GeneratorError: the message says what is missing.
    """
    accounts = len(np.unique(log.account))
    if accounts < ACCOUNTS_MIN:
        raise GeneratorError(
            f"the data have {accounts} accounts; a generator needs {ACCOUNTS_MIN} or more, or it"
            " would describe single people"
        )
    if len(log) < TRANSACTIONS_MIN:
        raise GeneratorError(
            f"the data have {len(log):,} transactions; a generator needs {TRANSACTIONS_MIN:,} or"
            " more"
        )
    days = int(log.day[-1]) + 1
    if days < DAYS_MIN:
        raise GeneratorError(f"the data span {days} days; a generator needs {DAYS_MIN} or more")
    labels = set(np.unique(log.label).tolist()) & {FRAUD, LEGITIMATE}
    if not labels:
        raise GeneratorError("no transaction has a label: no fraud can be learned from them")
    if len(labels) == 1:
        which = "fraud" if FRAUD in labels else "legitimate"
        raise GeneratorError(
            f"all labels say {which}: both classes are needed; look at the label's column"
        )


def sample_of(log: Dataset, settings: GeneratorSettings) -> Dataset:
    """Return whole accounts at random, up to the transactions of the settings."""
    if len(log) > settings.transactions_max:
        count = np.bincount(log.account)
        order = np.random.default_rng(settings.seed).permutation(len(count))
        kept = order[np.cumsum(count[order]) <= settings.transactions_max]
        if not len(kept):
            raise GeneratorError(
                f"one account has over {settings.transactions_max:,} transactions, the most that"
                " a training takes: leave it out"
            )
        return accounts_of(log, kept)
    return accounts_of(log, np.unique(log.account))


def accounts_of(log: Dataset, accounts: NDArray[np.int64] | NDArray[np.int32]) -> Dataset:
    """Return the transactions of some accounts, with new codes of accounts and merchants."""
    chosen = np.zeros(int(log.account.max()) + 1, np.bool_)
    chosen[accounts] = True
    rows = np.flatnonzero(chosen[log.account])

    def renumbered(codes: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.unique(codes[rows], return_inverse=True)[1].astype(np.int32)

    return dataclasses.replace(
        log,
        account=renumbered(log.account),
        merchant=renumbered(log.merchant),
        amount=np.asarray(log.amount[rows]),
        timestamp_ms=np.asarray(log.timestamp_ms[rows]),
        label=np.asarray(log.label[rows]),
        scenario=np.asarray(log.scenario[rows]),
        numeric={name: np.asarray(value[rows]) for name, value in log.numeric.items()},
        categorical={name: np.asarray(value[rows]) for name, value in log.categorical.items()},
    )


def _fit(
    sizes: GeneratorSizes, lessons: Lessons, settings: GeneratorSettings, report: Reporter
) -> tuple[GeneratorNetwork, list[float]]:
    """Fit a new network; return it with the mean losses of the last epoch, in nats a step."""
    rng = np.random.default_rng(settings.seed)
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = GeneratorNetwork(sizes)
        start_from(network, starting_tables(lessons, sizes))
        optimizer = torch.optim.AdamW(
            _groups(network), settings.learning_rate, (0.9, 0.99), weight_decay=0.0
        )
        accounts = len(lessons.length)
        chunks = sum(
            math.ceil(int(lessons.length[batch].max()) / settings.chunk_steps)
            for batch in _batches(lessons.length, settings.accounts_per_batch, rng)
        )
        updates, update = settings.epochs * chunks, 0
        means = [math.nan] * len(LOSSES)
        for epoch in range(settings.epochs):
            totals = torch.zeros(len(LOSSES))
            for batch in _batches(lessons.length, settings.accounts_per_batch, rng):
                hidden: Tensor | None = None
                for at, there in _chunks(lessons, batch, settings.chunk_steps):
                    share = min(update / updates, 1.0)
                    rate = min(1.0, share / _RISE_SHARE + 0.02) * (
                        0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2
                    )
                    for group in optimizer.param_groups:
                        group["lr"] = settings.learning_rate * rate
                    before = None if hidden is None else hidden[:, : len(at)]
                    found, hidden = _chunk_losses(network, lessons, at, there, before)
                    loss = found.sum() / there.sum()
                    if not torch.isfinite(loss):
                        raise GeneratorError("the loss is no longer finite: lower learning_rate")
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM_MAX)
                    optimizer.step()
                    totals += found.detach()
                    update += 1
                    done = _LESSONS_SHARE + (0.99 - _LESSONS_SHARE) * share
                    note = f"loss {loss.item():.3f}"
                    report(Report(f"epoch {epoch + 1} of {settings.epochs}", done, note))
            means = (totals / int(lessons.length.sum() - accounts)).tolist()
    return network.eval(), means


def _groups(network: GeneratorNetwork) -> list[dict[str, Any]]:
    named = dict(network.named_parameters())
    decayed = [named[name] for name in _DECAYED]
    others = [value for name, value in named.items() if name not in _DECAYED]
    return [{"params": decayed, "weight_decay": HEAD_WEIGHT_DECAY}, {"params": others}]


def _batches(
    length: NDArray[np.int64], size: int, rng: np.random.Generator
) -> list[NDArray[np.intp]]:
    """Return batches of accounts of about the same length, the longest first, in random order."""
    order = np.argsort(-length * np.exp(rng.normal(0, 0.1, len(length))), kind="stable")
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [
        batch[np.argsort(-length[batch], kind="stable")]
        for batch in (batches[place] for place in rng.permutation(len(batches)))
    ]


def _chunks(
    lessons: Lessons, batch: NDArray[np.intp], steps: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    """Yield places [n, steps] of the lessons, and whether there is a step [n, steps]."""
    start, length = lessons.start[batch], lessons.length[batch]
    for begin in range(0, int(length.max()), steps):
        active = int((length > begin).sum())
        within = np.arange(begin, begin + steps)
        there = within < length[:active, None]
        yield start[:active, None] + np.minimum(within, length[:active, None] - 1), there


def _chunk_losses(
    network: GeneratorNetwork,
    lessons: Lessons,
    at: NDArray[np.intp],
    there: NDArray[np.bool_],
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the summed losses of a chunk, and the hidden state after it, without gradient."""
    states, last = network(torch.from_numpy(lessons.inputs[at]), hidden)
    return step_losses(network, lessons, at[there], states[torch.from_numpy(there)]), last.detach()


def step_losses(
    network: GeneratorNetwork, lessons: Lessons, rows: NDArray[np.intp] | slice, states: Tensor
) -> Tensor:
    """Return the summed losses of steps by part, see :func:`model.generator.network.losses`.

    Args:
        rows: the steps.
        states: [m, H] their hidden states.
    """

    def of(table: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(table[rows].astype(np.float32))

    return losses(
        network,
        states,
        of(lessons.time_inputs),
        torch.from_numpy(lessons.targets[rows].astype(np.int64)),
        torch.from_numpy(lessons.fields[rows]),
        torch.from_numpy(lessons.hub_edge[rows]),
        (
            of(lessons.time_base),
            of(lessons.slot_base),
            of(lessons.fraud_base),
            of(lessons.merchant_base),
        ),
    )
