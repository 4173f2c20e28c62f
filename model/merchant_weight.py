"""How far a transaction explains its own fraud: what a known fraud says about its merchant.

Most frauds have one of two causes: something about the payment itself (the amount, the account),
or a merchant that was compromised. Only the second says something about the merchant's other
payments. A small network estimates the probability of fraud from the payment and its account
alone. It is the sum of what these explain and of a constant rest r, which they do not:

    p(x) = r + (1 - r) sigmoid(f(x))

By Bayes' rule r / p(x) of the frauds like x belong to the rest. That is the *merchant weight* of
the transaction: with it a known fraud counts at its merchant (:mod:`model.features.merchant`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.features.merchant import WEIGHT_MAX
from model.training.adamw import AdamW

OWN_SIZE = 32
"""Hidden units of the network."""

BATCH = 1024
UPDATES = 4000
LEARNING_RATE = 3e-3
EXPLAINED_START = -3.0
"""The logit of what payments explain begins so far under that of the share of fraud, and the rest
at it. So what no input explains stays with the rest: a constant could be either."""

GRADIENT_NORM_MAX = 1.0
REPORT_EVERY = 100

REMEMBERED_WEIGHT = 63
"""A stored weight over it counts in full. So only few transactions have one to be remembered."""


class OwnRisk(nn.Module):
    """Probability of fraud as far as the payment and its account explain it, and the rest.

    Args:
        inputs: numbers of the payment and its account.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, OWN_SIZE)
        self.explained = nn.Linear(OWN_SIZE, 1)
        self.rest = nn.Parameter(torch.zeros(1))

    def log_risk(self, own: Tensor) -> Tensor:
        """[n, I] -> [n]: the logarithm of p."""
        z = self.explained(F.relu(self.hidden(own))).squeeze(-1)
        # p = 1 - (1 - r)(1 - s): the payment's cause and the rest are independent.
        neither = F.logsigmoid(-self.rest) + F.logsigmoid(-z)
        return torch.log(-torch.expm1(neither))

    def merchant_weight(self, own: Tensor) -> NDArray[np.uint8]:
        """[n, I] -> uint8[n]: r / p, in parts of :data:`model.features.merchant.WEIGHT_MAX`."""
        with torch.inference_mode():
            share = torch.exp(F.logsigmoid(self.rest) - self.log_risk(own))
        whole = share.clamp(0.0, 1.0).mul(WEIGHT_MAX).round().numpy().astype(np.uint8)
        whole[whole > REMEMBERED_WEIGHT] = WEIGHT_MAX
        return whole


def fit_own_risk(
    own_at: Callable[[NDArray[np.intp]], Tensor],
    is_fraud: NDArray[np.bool_],
    inputs: int,
    seed: int,
    show: Callable[[float], None] = lambda _: None,
) -> OwnRisk:
    """Fit the network to n labelled transactions of the training period, in seconds.

    Args:
        own_at: gives the inputs [m, I] of transactions [m], on the CPU.
        is_fraud: [n].
        show: called with the share that is done.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = OwnRisk(inputs)
    rate = float(np.clip(is_fraud.mean(), 1 / (1 + len(is_fraud)), 0.5))
    with torch.no_grad():
        network.rest.fill_(float(np.log(rate / (1 - rate))))
        network.explained.bias.fill_(network.rest.item() + EXPLAINED_START)
    rng = np.random.default_rng(seed)
    parameters = list(network.parameters())
    optimizer = AdamW(parameters, 0.0)
    truth = torch.from_numpy(is_fraud.astype(np.float32))
    for update in range(UPDATES):
        rows = rng.integers(0, len(is_fraud), BATCH)
        optimizer.learning_rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * update / UPDATES))
        log_p = network.log_risk(own_at(rows))
        log_not = torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))
        fraud = truth[rows]
        loss = -(fraud * log_p + (1 - fraud) * log_not).mean()
        optimizer.update(torch.autograd.grad(loss, parameters), GRADIENT_NORM_MAX)
        if update % REPORT_EVERY == 0:
            show(update / UPDATES)
    return network.eval().requires_grad_(False)
