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

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.features.merchant import WEIGHT_MAX

HIDDEN_SIZE = 32
"""Hidden units of the network."""

REMEMBERED_WEIGHT = 63
"""A stored weight over it counts in full. So only few transactions have one to be remembered."""


class MerchantWeightNetwork(nn.Module):
    """Probability of fraud as far as the payment and its account explain it, and the rest.

    Args:
        inputs: numbers of the payment and its account.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, HIDDEN_SIZE)
        self.explained = nn.Linear(HIDDEN_SIZE, 1)
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
