"""What decides a training, and how it tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from model.features.spec import LABEL_DELAY_MAX_DAYS, FeatureSpec
from model.network import Architecture
from model.simulator.world import WORLDS, WorldName
from model.training.inputs import embedding_sizes

TRANSACTIONS_MAX = 100_000_000
"""Most transactions to simulate; on disk they take about 260 bytes each."""


class TrainingError(ValueError):
    """Training cannot begin or go on; the message says why and what to change."""


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a trained checkpoint, besides the data.

    Raises:
        TrainingError: a value is out of its bounds; the message names it.
    """

    customers: int = 5000
    terminals: int = 10_000
    days: int = 183
    start_date: str = "2018-04-01"
    world: WorldName = "wide"
    """Which accounts, merchants and frauds are simulated: see :mod:`model.simulator.world`."""
    seed: int = 1
    """Of data, weights and dropout. Not the simulator's default: that stays data never seen."""

    train_until: str | None = None
    """ISO 8601, a date or a time (UTC unless it names a zone): no label from then on is learned
    from. None: by the length of the data."""
    test_from: str | None = None
    """ISO 8601: metrics are measured from then on. None: when the labels have arrived."""
    label_delay_days: float = 7.0
    """How long after a transaction it is known whether it was fraud."""

    hidden_size: int = 128
    layers: int = 1
    input_size: int = 64
    head_size: int = 64
    dropout: float = 0.1

    epochs: int | None = None
    """None: 12, more where the data are few."""
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    chunk_steps: int = 64
    accounts_per_batch: int | None = None
    """None: 32, fewer where that would make few updates."""

    review_false_positive_rate: float = 0.002
    """Of the legitimate transactions at most this share is reviewed or declined."""
    decline_precision: float = 0.9
    """Of the declined transactions at least this share is fraud."""

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
        """The network's sizes for these inputs."""
        return Architecture(
            inputs=len(spec.roles),
            input_size=self.input_size,
            hidden_size=self.hidden_size,
            layers=self.layers,
            head_size=self.head_size,
            dropout=self.dropout,
            embeddings=embedding_sizes(spec),
            roles=spec.roles,
        )

    def moment_ms(self, name: Literal["train_until", "test_from"] | str) -> int | None:
        """``train_until`` or ``test_from`` in epoch milliseconds; None where it is left open."""
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
    """How far the training is, for who watches.

    Attributes:
        stage: what is being done.
        done: share of the whole training, 0 to 1, in time.
        note: a figure worth reading, or nothing.
        lasting: the note is to be kept in sight, not only until the next one.
    """

    stage: str
    done: float
    note: str = ""
    lasting: bool = False


Reporter = Callable[[Report], None]
