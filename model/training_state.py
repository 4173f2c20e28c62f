"""How far a training has come, in a file beside its output, so that it goes on where it stopped.

One safetensors file: the tensors of network and optimizer, and a few numbers as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.gru import Network

_NETWORK, _BEST, _OPTIMIZER = "network.", "best.", "optimizer."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Position(msgspec.Struct, frozen=True):
    """Where a training is.

    Attributes:
        epoch, batch: what comes next.
        best_epoch: the best so far by ``best``; -1 while none is measured.
        best: average precision on the validation period.
    """

    epoch: int = 0
    batch: int = 0
    best_epoch: int = -1
    best: float = -1.0


@dataclass(frozen=True)
class TrainingState:
    """The file that holds the state of one training."""

    path: Path

    def save(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        position: Position,
        best: dict[str, Tensor],
    ) -> None:
        """Writes all of it or nothing."""
        tensors = {_NETWORK + name: value for name, value in network.state_dict().items()}
        tensors |= {_BEST + name: value for name, value in best.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{_OPTIMIZER}{number}.{name}": state[name] for name in _MOMENTS}
        content = safetensors.torch.save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            {"position": msgspec.json.encode(position).decode()},
        )
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(self.path)

    def load(
        self, network: Network, optimizer: torch.optim.Optimizer
    ) -> tuple[Position, dict[str, Tensor]]:
        """Puts the saved state into network and optimizer; the beginning if there is none."""
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
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in of(_OPTIMIZER).items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        return position, of(_BEST)
