"""The settings of a training, and the reports of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from model.architecture import Architecture
from model.features.spec import LABEL_DELAY_MAX_DAYS, FeatureSpec
from model.simulator.world import WORLDS, WorldName
from model.training.inputs import embedding_sizes

TRANSACTIONS_MAX = 100_000_000
"""Most simulated transactions; each takes about 260 bytes on disk."""


class TrainingError(ValueError):
    """Training cannot start or continue; the message says why and what to change."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that, together with the data, decide a checkpoint.

    Raises:
        TrainingError: a value is out of bounds; the message names it.
    """

    customers: int = 5000
    terminals: int = 10_000
    days: int = 183
    start_date: str = "2018-04-01"
    world: WorldName = "wide"
    """Simulated accounts, merchants and frauds: see :mod:`model.simulator.world`."""
    seed: int = 1
    """Seed of data, weights and dropout. Data of the simulator's default seed stay unseen."""

    train_until: str | None = None
    """Date or time (ISO 8601, UTC without a zone) from which no label is learned from.

    None: chosen by the length of the data."""
    test_from: str | None = None
    """Date or time (ISO 8601) from which metrics are measured. None: when the labels arrived."""
    label_delay_days: float = 7.0
    """Days after a transaction until its label is known."""

    hidden_size: int = 128
    layers: int = 1
    input_size: int = 64
    head_size: int = 64
    dropout: float = 0.1

    epochs: int | None = None
    """Number of epochs. None: 12, or more with few data."""
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    chunk_steps: int = 64
    accounts_per_batch: int | None = None
    """Accounts in a batch. None: 32; fewer if there are few accounts, or few updates an epoch."""

    review_false_positive_rate: float = 0.002
    """Largest share of the legitimate transactions that is reviewed or declined."""
    decline_precision: float = 0.9
    """Smallest share of fraud among the declined transactions."""

    forecast: bool = True
    """Whether a forecast head is fitted after the network."""

    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        self._check_numbers()
        if not 0 <= self.label_delay_days <= LABEL_DELAY_MAX_DAYS:
            raise TrainingError(
                f"label_delay_days is {self.label_delay_days}; it must be 0 to "
                f"{LABEL_DELAY_MAX_DAYS:g}"
            )
        for name in ("train_until", "test_from"):
            self.moment_ms(name)
        if self.world not in WORLDS:
            raise TrainingError(f"world is {self.world!r}; it must be {' or '.join(WORLDS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise TrainingError(f"device is {self.device!r}; it must be auto, cpu or cuda")
        expected = 2 * self.customers * self.days
        if expected > TRANSACTIONS_MAX:
            raise TrainingError(
                f"{self.customers} customers over {self.days} days make about {expected:,} "
                f"transactions; at most {TRANSACTIONS_MAX:,} fit: lower customers or days"
            )
        try:
            self.architecture(FeatureSpec())
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def _check_numbers(self) -> None:
        whole = {"days": 14, "epochs": 1, "chunk_steps": 1, "accounts_per_batch": 1, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainingError(f"{name} is {value}; it must be {least} or more")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be 0 to 1")
        for name in ("review_false_positive_rate", "decline_precision"):
            if not 0 < getattr(self, name) < 1:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}; it must be over 0 and under 1"
                )

    def architecture(self, spec: FeatureSpec) -> Architecture:
        """Return the sizes of the network for these inputs."""
        return Architecture(
            inputs=len(spec.roles),
            input_size=self.input_size,
            hidden_size=self.hidden_size,
            layers=self.layers,
            head_size=self.head_size,
            dropout=self.dropout,
            embeddings=embedding_sizes(spec),
            roles=spec.roles,
            category_slopes=True,
        )

    def moment_ms(self, name: Literal["train_until", "test_from"] | str) -> int | None:
        """Return ``train_until`` or ``test_from`` in epoch milliseconds; None if it is not set."""
        text = getattr(self, name)
        if text is None:
            return None
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise TrainingError(
                f"{name} is {text[:40]!r}; it must be a date or a time such as 2018-07-01"
            ) from error
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1000)


@dataclass(frozen=True)
class Report:
    """Progress of a training.

    Attributes:
        stage: the current step.
        done: share of the total time that has passed, 0 to 1.
        note: a figure to show, or nothing.
        lasting: whether the note stays visible after the next report.
    """

    stage: str
    done: float
    note: str = ""
    lasting: bool = False


Reporter = Callable[[Report], None]
