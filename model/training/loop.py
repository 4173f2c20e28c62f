"""The training loop: truncated back-propagation through time.

A batch of accounts runs through its history in chunks. The hidden state passes from chunk to chunk;
the gradient does not. A batch is split into slices of accounts, with a thread for each slice. The
gradients of the slices are added in a fixed order. So two cores halve the time, and the result does
not depend on the number of cores or the order of the threads.

Random numbers depend only on the seed and the position in the training (epoch, batch, chunk,
slice). An interrupted training therefore continues exactly as if it had not stopped.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.network import Network
from model.training.adamw import AdamW
from model.training.resume import Position, TrainingState
from model.training.sequences import Inputs, Sequences, TensorInputs, one_core_each
from model.training.settings import Report, Reporter, TrainingError, TrainingSettings
from model.training.split import Split

RECIPE = 5
"""Version of the recipe: the weights that the same data and settings give.

Cached or unfinished trainings of another version are not used."""

EPOCHS = 12
"""Default number of epochs. The Handbook's data need 8; bursts on 1,000 accounts gain by more
(docs/model.md)."""

EPOCHS_MAX = 40
UPDATES_MIN = 4000
"""Fewest updates of a training; with few data it runs more epochs to reach them."""

ACCOUNTS_PER_BATCH = 32
ACCOUNTS_PER_BATCH_MIN = 8
EPOCH_UPDATES_MIN = 400
"""Fewest updates in an epoch; with few data the batches are smaller to reach them.

The number of updates decides the quality. On the Handbook's data and 6 epochs, average precision
was .767 with 256 accounts in a batch, .794 with 64 and .796 with 32. With 8 epochs it was .798."""

BATCH_SHARE_MAX = 1 / 64
"""Largest share of the accounts in a batch; with few accounts the batches are smaller.

On bursts of 600 accounts average precision was .9493 with 16 accounts in a batch and .9559 with
8, in as much time."""

GRADIENT_NORM_MAX = 1.0
RISE_SHARE = 0.02
"""Share of the training in which the learning rate rises; then it falls as a cosine."""

LENGTH_JITTER = 0.1
"""Random relative change of an account's length before accounts are batched by length."""

SLICES = 2
"""Slices of a batch: fixed, so that a training gives the same network on any machine."""

CATEGORY_UNKNOWN_SHARE = 0.01
"""Share of the categories that training replaces by the unknown one, to train its vector."""

VALIDATED_SHARE = 0.5
"""Share of the epochs, at the end, after which the network is validated; the best one is kept."""

SAVE_EVERY_SECONDS = 30.0

Rows = NDArray[np.intp]
Bools = NDArray[np.bool_]


class LabelledLog(Protocol):
    """N labelled transactions in order of time, as far as fitting needs them."""

    @property
    def account(self) -> NDArray[np.int32] | NDArray[np.int64]:
        """[N] code of the account."""
        ...

    @property
    def day(self) -> NDArray[np.int64]:
        """[N] days since the first transaction's day."""
        ...

    @property
    def is_fraud(self) -> Bools:
        """[N] whether it is fraud; False without a label."""
        ...

    @property
    def is_labelled(self) -> Bools:
        """[N] whether the label is known."""
        ...


def device_of(settings: TrainingSettings) -> torch.device:
    """Return the device of a training: a GPU if there is one, unless the settings forbid it.

    Raises:
        TrainingError: the settings ask for a GPU, and PyTorch finds none.
    """
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise TrainingError("device is cuda, but PyTorch finds no GPU; use auto or cpu")
    return torch.device("cuda" if there and settings.device != "cpu" else "cpu")


def fit(
    network: Network,
    inputs: Tensor | Inputs,
    truth: LabelledLog,
    split: Split,
    settings: TrainingSettings,
    report: Reporter = lambda _: None,
    *,
    sequences: Sequences | None = None,
    restarted: tuple[Inputs, Sequences] | None = None,
    validate: Callable[[Network], float] | None = None,
    state: TrainingState | None = None,
) -> None:
    """Fit the network's parameters to the training days, in place.

    Args:
        network: a new network.
        inputs: [N, I] in the order of the log, on the network's device; or account by account.
        truth: the labelled transactions.
        split: the periods; only training days count in the loss.
        settings: the settings of the training.
        report: called often; ``done`` is the share of the fitting.
        sequences: the transactions of each account, if known.
        restarted: inputs and sequences of the same log with restarted accounts. Every other epoch
            learns from these.
        validate: measures a network; the best of the last epochs is kept. None: the last one is.
        state: progress of an interrupted fitting; it is also saved there.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    sequences = sequences or Sequences(truth.account)
    if isinstance(inputs, Tensor):
        inputs = TensorInputs(inputs, sequences)
    views = [(inputs, sequences), *([] if restarted is None else [restarted])]
    _Fitting(network, views, truth, split, settings).run(report, validate, state)


class _Fitting:
    def __init__(
        self,
        network: Network,
        views: Sequence[tuple[Inputs, Sequences]],
        truth: LabelledLog,
        split: Split,
        settings: TrainingSettings,
    ) -> None:
        self._network = network
        self._settings = settings
        seen = int(np.searchsorted(truth.day, split.validation))  # the log's first rows
        self._views = [(inputs, sequences.before(seen)) for inputs, sequences in views]
        sequences = self._views[0][1]
        self._fraud = truth.is_fraud[sequences.row].astype(np.float32)  # by position
        self._scored = (truth.is_labelled & (truth.day >= split.training))[sequences.row]
        self._parameters = list(network.parameters())
        self._device = self._parameters[0].device
        self._accounts = settings.accounts_per_batch or _accounts_per_batch(
            sequences, settings.chunk_steps
        )
        updates = _updates(sequences, self._accounts, settings.chunk_steps)
        self._epochs = settings.epochs or min(
            EPOCHS_MAX, max(EPOCHS, math.ceil(UPDATES_MIN / max(1, updates)))
        )
        # Dropout between layers draws from the global generator, which threads would share.
        several = settings.layers == 1 and self._device.type == "cpu"
        self._slices = SLICES if several else 1
        self._optimizer = AdamW(self._parameters, settings.weight_decay)
        self._best: dict[str, Tensor] = {}
        self._losses: list[float] = []

    def run(
        self,
        report: Reporter,
        validate: Callable[[Network], float] | None,
        state: TrainingState | None,
    ) -> None:
        at = Position()
        if state is not None:
            at, self._best = state.load(self._network, self._optimizer)
        saved_at = time.monotonic()
        self._network.train()
        with _seedable_dropout(self._network) as dropout, self._threads() as pool:
            while at.epoch < self._epochs:
                batches = self._batches(at.epoch)
                while at.batch < len(batches):
                    self._report(report, at, len(batches))
                    if state is not None and time.monotonic() - saved_at > SAVE_EVERY_SECONDS:
                        state.save(self._network, self._optimizer, at, self._best)
                        saved_at = time.monotonic()
                    done = (at.epoch + at.batch / len(batches)) / self._epochs
                    self._optimizer.learning_rate = self._settings.learning_rate * _rise_and_fall(
                        done
                    )
                    self._batch(batches[at.batch], (at.epoch, at.batch), dropout, pool)
                    at = msgspec.structs.replace(
                        at, batch=at.batch + 1, updates=self._optimizer.updates
                    )
                at = self._epoch_done(at, validate)
                if state is not None:
                    state.save(self._network, self._optimizer, at, self._best)
                    saved_at = time.monotonic()
        if self._best:
            self._network.load_state_dict(self._best)

    def _epoch_done(self, at: Position, validate: Callable[[Network], float] | None) -> Position:
        if not np.isfinite(self._losses).all():
            raise TrainingError(
                f"the loss is no longer finite in epoch {at.epoch + 1}; lower learning_rate "
                f"({self._settings.learning_rate})"
            )
        self._losses = []
        best_epoch, best = at.best_epoch, at.best
        if validate is not None and at.epoch + 1 > self._epochs * (1 - VALIDATED_SHARE):
            self._network.eval()
            found = validate(self._network)
            self._network.train()
            if found > best:
                best_epoch, best = at.epoch, found
                self._best = {k: v.clone() for k, v in self._network.state_dict().items()}
        return Position(at.epoch + 1, 0, best_epoch, best, at.updates)

    def _report(self, report: Reporter, at: Position, batches: int) -> None:
        notes = [f"loss {np.mean(self._losses):.5f}"] if self._losses else []
        if at.best_epoch >= 0:
            notes.append(f"validation AP {at.best:.4f}")
        done = (at.epoch + at.batch / batches) / self._epochs
        report(Report(f"epoch {at.epoch + 1} of {self._epochs}", done, ", ".join(notes)))

    def _view(self, epoch: int) -> tuple[Inputs, Sequences]:
        return self._views[epoch % len(self._views)]

    def _batches(self, epoch: int) -> list[Rows]:
        """Return batches of accounts of similar length, in random order."""
        rng = np.random.default_rng([self._settings.seed, epoch])
        _, sequences = self._view(epoch)
        length = sequences.length
        jitter = rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(length))
        by_length = np.argsort(length * jitter)
        by_length = by_length[length[by_length] > 0]
        size = self._accounts
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        rng.shuffle(batches)
        return batches

    def _batch(
        self,
        accounts: Rows,
        place: tuple[int, int],
        dropout: _SeedableDropout,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Train on one batch of accounts, with an update for each chunk."""
        inputs, sequences = self._view(place[0])
        slices = [_Slice(self._network, inputs, dropout) for _ in range(self._slices)]
        runs = [
            sequences.chunks(accounts[i :: self._slices], self._settings.chunk_steps)
            for i in range(self._slices)
        ]
        for chunk, parts in enumerate(zip_longest(*runs)):
            weights = [None if p is None else p[1] & self._scored[p[0]] for p in parts]
            scored = sum(int(w.sum()) for w in weights if w is not None)
            jobs = [
                _Job(
                    position=part[0],
                    fraud=self._fraud[part[0]],
                    weight=weight,
                    scored=scored,
                    seed=_seed(self._settings.seed, *place, chunk, number),
                )
                if part is not None and weight is not None
                else None
                for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
            ]
            results = list(pool.map(_Slice.advance, slices, jobs))
            if scored:
                self._update([r for r in results if r is not None])

    def _update(self, results: Sequence[tuple[float, Sequence[Tensor | None]]]) -> None:
        self._losses.append(sum(loss for loss, _ in results))
        gradients: list[Tensor | None] = []
        for slices in zip(*(slice for _, slice in results), strict=True):
            there = [gradient for gradient in slices if gradient is not None]
            gradients.append(sum(there[1:], there[0]) if there else None)
        self._optimizer.update(gradients, GRADIENT_NORM_MAX)

    @contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), one_core_each(self._slices) as pool:
            yield pool


@dataclass(frozen=True)
class _Job:
    """A chunk of a slice: [n, T] in every array.

    Attributes:
        position: positions of the inputs.
        fraud: 0 or 1.
        weight: whether the transaction counts in the loss.
        scored: number of transactions that count, in this chunk of the whole batch.
        seed: seed of dropout.
    """

    position: Rows
    fraud: NDArray[np.float32]
    weight: Bools
    scored: int
    seed: int


class _Slice:
    """Some accounts of a batch, with their hidden states so far."""

    def __init__(self, network: Network, inputs: Inputs, dropout: _SeedableDropout) -> None:
        self._network = network
        self._inputs = inputs
        self._dropout = dropout
        self._hidden: Tensor | None = None

    def advance(self, job: _Job | None) -> tuple[float, Sequence[Tensor | None]] | None:
        """Return the loss (its share of the batch's mean) and the gradients of one chunk."""
        if job is None:
            return None
        before = None if self._hidden is None else self._hidden[: len(job.position)].detach()
        inputs = self._inputs.at(job.position)  # [n, T, I]
        generator = self._dropout.seed(job.seed, inputs.device)
        self._forget_categories(inputs, generator)
        with torch.set_grad_enabled(bool(job.weight.any())):
            logits, self._hidden = self._network.unroll(inputs, before)  # [n, T]
            if not job.weight.any():
                return None
            weight = torch.from_numpy(job.weight).to(inputs.device)
            fraud = torch.from_numpy(job.fraud).to(inputs.device)
            loss = (
                F.binary_cross_entropy_with_logits(logits[weight], fraud[weight], reduction="sum")
                / job.scored
            )
            parameters = list(self._network.parameters())
            return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True)

    def _forget_categories(self, inputs: Tensor, generator: torch.Generator) -> None:
        categories = inputs[..., self._network.architecture.inputs :]  # [n, T, C]
        if categories.shape[-1]:
            chance = torch.rand(categories.shape, generator=generator, device=inputs.device)
            categories[chance < CATEGORY_UNKNOWN_SHARE] = 0.0


class _SeedableDropout(nn.Dropout):
    """Dropout with a random generator for each thread."""

    def __init__(self, p: float, whole: bool) -> None:
        super().__init__(p)
        self._local = threading.local()
        self._whole = whole

    def seed(self, seed: int, device: torch.device) -> torch.Generator:
        """Seed this thread's generator and return it."""
        generator: torch.Generator | None = getattr(self._local, "generator", None)
        if generator is None:
            generator = self._local.generator = torch.Generator(device)
        if self._whole:  # dropout between layers uses the global generator
            torch.manual_seed(seed)
        return generator.manual_seed(seed)

    def forward(self, input: Tensor) -> Tensor:
        """Drop inputs at random while training."""
        if not self.training or self.p == 0:
            return input
        kept = torch.empty_like(input).bernoulli_(1 - self.p, generator=self._local.generator)
        return input * kept.div_(1 - self.p)


@contextmanager
def _seedable_dropout(network: Network) -> Iterator[_SeedableDropout]:
    own = network.dropout
    network.dropout = dropout = _SeedableDropout(own.p, network.architecture.layers > 1)
    dropout.train(network.training)
    try:
        yield dropout
    finally:
        network.dropout = own
        own.train(network.training)


def _seed(seed: int, epoch: int, batch: int, chunk: int, number: int) -> int:
    """Return a seed for a position in the training."""
    mixed = np.random.SeedSequence([seed, epoch, batch, chunk, number]).generate_state(2)
    return int(mixed[0]) << 31 | int(mixed[1]) >> 1


def _updates(sequences: Sequences, accounts: int, chunk_steps: int) -> int:
    """Estimate the updates in an epoch."""
    longest_first = np.sort(sequences.length)[::-1]
    return int(np.ceil(longest_first[::accounts] / chunk_steps).sum())


def _accounts_per_batch(sequences: Sequences, chunk_steps: int) -> int:
    size = ACCOUNTS_PER_BATCH
    most = np.count_nonzero(sequences.length) * BATCH_SHARE_MAX
    while size > ACCOUNTS_PER_BATCH_MIN and (
        size > most or _updates(sequences, size, chunk_steps) < EPOCH_UPDATES_MIN
    ):
        size //= 2
    return size


def _rise_and_fall(done: float) -> float:
    """Return the learning rate as a share of the highest one."""
    rising = min(1.0, (done + 1e-3) / RISE_SHARE)
    return rising * 0.5 * (1 + math.cos(math.pi * done))
