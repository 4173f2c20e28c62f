"""Saved progress of a training, from which an interrupted one continues.

It is one safetensors file: the tensors of network and optimizer, and a few numbers as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from model.network import Network
from model.training.adamw import AdamW

_NETWORK, _BEST, _MEAN, _SQUARE = "network.", "best.", "mean.", "square."


class Position(msgspec.Struct, frozen=True):
    """Position of a training.

    Attributes:
        epoch, batch: the next batch.
        best_epoch: the best epoch so far; -1 before the first validation.
        best: its average precision on the validation period.
        updates: updates of the optimizer so far.
    """

    epoch: int = 0
    batch: int = 0
    best_epoch: int = -1
    best: float = -1.0
    updates: int = 0


@dataclass(frozen=True)
class TrainingState:
    """File with the state of one training."""

    path: Path

    def save(
        self,
        network: Network,
        optimizer: AdamW,
        position: Position,
        best: dict[str, Tensor],
    ) -> None:
        """Write the file completely or not at all."""
        tensors = {_NETWORK + name: value for name, value in network.state_dict().items()}
        tensors |= {_BEST + name: value for name, value in best.items()}
        tensors |= {f"{_MEAN}{number}": value for number, value in enumerate(optimizer.mean)}
        tensors |= {f"{_SQUARE}{number}": value for number, value in enumerate(optimizer.square)}
        content = safetensors.torch.save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            {"position": msgspec.json.encode(position).decode()},
        )
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(self.path)

    def load(self, network: Network, optimizer: AdamW) -> tuple[Position, dict[str, Tensor]]:
        """Load the saved state into network and optimizer; nothing without a file."""
        if not self.path.is_file():
            return Position(), {}
        with safetensors.safe_open(self.path, "pt") as file:
            position = msgspec.json.decode(file.metadata()["position"], type=Position)
        tensors = safetensors.torch.load_file(self.path)

        def of(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        network.load_state_dict(of(_NETWORK))
        optimizer.updates = position.updates
        for prefix, values in ((_MEAN, optimizer.mean), (_SQUARE, optimizer.square)):
            for number, value in of(prefix).items():
                values[int(number)].copy_(value)
        return position, of(_BEST)
