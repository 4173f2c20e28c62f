"""The settings of a generator's training, and its errors."""

from __future__ import annotations

from dataclasses import dataclass

ACCOUNTS_MIN = 50
"""Fewest accounts; a profile density of fewer would describe single people."""

TRANSACTIONS_MIN = 2_000

TRAINING_TRANSACTIONS_MAX = 600_000
"""Most transactions of the training; of more, whole accounts are drawn. Each takes 600 bytes."""

EPOCHS = 6


class GeneratorError(ValueError):
    """A generator cannot be trained, read or used; the message says why and what to change."""


@dataclass(frozen=True)
class GeneratorSettings:
    """Settings that, together with the data, decide a generator.

    Raises:
        GeneratorError: a value is out of bounds; the message names it.
    """

    hidden_size: int = 48
    head_size: int = 48
    epochs: int = EPOCHS
    seed: int = 1
    learning_rate: float = 4e-3
    accounts_per_batch: int = 48
    chunk_steps: int = 64
    transactions_max: int = TRAINING_TRANSACTIONS_MAX

    def __post_init__(self) -> None:
        bounds = {
            "hidden_size": (4, 1024),
            "head_size": (4, 1024),
            "epochs": (1, 1000),
            "seed": (0, 2**63 - 1),
            "accounts_per_batch": (1, 4096),
            "chunk_steps": (2, 1024),
            "transactions_max": (TRANSACTIONS_MIN, 10_000_000),
        }
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise GeneratorError(
                    f"{name} is {getattr(self, name)}; it must be {least} to {most}"
                )
        if not 0 < self.learning_rate <= 1:
            raise GeneratorError(f"learning_rate is {self.learning_rate}; it must be over 0")
