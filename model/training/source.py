"""Sources of labelled transactions: the protocol, and the simulator as a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.data.dataset import FRAUD, LEGITIMATE, Dataset, DatasetWriter, Rows
from model.simulator.handbook import DayOfTransactions, Simulator
from model.simulator.world import WORLDS
from model.training.settings import TrainingSettings


class DataSource(Protocol):
    """Source of labelled transactions."""

    def identity(self) -> str:
        """Return a text that differs whenever other transactions would be written."""
        ...

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        """Write the transactions to an empty folder.

        Args:
            folder: the folder to write to.
            show: called with the share done and a note.
        """
        ...

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        """Return the settings that decide the checkpoint, by name."""
        ...


class SimulatedData:
    """The first days of the simulator, all transactions of them."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._settings = settings
        self._simulator = simulator_of(settings)

    def identity(self) -> str:
        """Return the settings of the simulation as text."""
        s = self._settings
        return f"simulated {s.world} {s.customers} {s.terminals} {s.days} {s.start_date} {s.seed}"

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        """Write the simulated transactions; see :class:`DataSource`."""
        with DatasetWriter(folder) as writer:
            for day in islice(self._simulator.days(), self._settings.days):
                writer.append(_rows(day))
                show(day.day / self._settings.days, "")
            return writer.finish("EUR")

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        """Return all settings."""
        return dataclasses.asdict(settings)


def simulator_of(settings: TrainingSettings) -> Simulator:
    """Return the simulator that the settings describe."""
    s = settings
    return Simulator(s.customers, s.terminals, s.start_date, s.seed, WORLDS[s.world])


def _rows(day: DayOfTransactions) -> Rows:
    return Rows(
        account=day.account.astype(np.uint64),
        merchant=day.merchant.astype(np.uint64),
        amount=day.amount,
        timestamp_ms=day.timestamp_ms,
        label=np.where(day.is_fraud, FRAUD, LEGITIMATE).astype(np.int8),
        scenario=day.scenario,
        key=day.transaction_id.astype(np.uint64),
    )
