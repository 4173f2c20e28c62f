"""The optimizer AdamW (Loshchilov and Hutter 2019).

Kept by hand because it was measured: the first use of torch.optim imports a compiler and takes
seconds. The updates are the same. The state is two tensors for each parameter, which a training
saves to resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW:
    """AdamW; it updates parameters in place and skips those without a gradient.

    Attributes:
        learning_rate: rate of the next update.
        updates: number of updates so far.
        mean, square: decayed mean and square of each parameter's gradient.
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
        """Make one step by these gradients, whose common norm is clipped to ``norm_max``."""
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
