"""AdamW (Loshchilov and Hutter 2019) over a network's parameters.

As torch.optim's, whose first use imports a compiler and takes seconds; and its state is two
tensors for each parameter, which a file can hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW:
    """Updates parameters in place; one without a gradient stays as it is.

    Attributes:
        learning_rate: of the next update.
        updates: made so far.
        mean, square: of each parameter's gradient, decayed.
    """

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float) -> None:
        self.learning_rate = 0.0
        self.updates = 0
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        self._parameters = parameters
        self._weight_decay = weight_decay

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None], norm_max: float) -> None:
        """One step by these gradients, shortened to ``norm_max`` together."""
        there = [g for g in gradients if g is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in there]))
        shortened = torch.clamp(norm_max / (norm + 1e-6), max=1.0)
        self.updates += 1
        first, second = (1 - beta**self.updates for beta in BETAS)
        every = zip(self._parameters, gradients, self.mean, self.square, strict=True)
        for parameter, gradient, mean, square in every:
            if gradient is None:
                continue
            gradient = gradient * shortened
            parameter.mul_(1 - self.learning_rate * self._weight_decay)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = (square / second).sqrt_().add_(EPSILON)
            parameter.addcdiv_(mean, size, value=-self.learning_rate / first)
