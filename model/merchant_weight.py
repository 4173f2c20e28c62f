"""The merchant weight of a fraud: the degree to which its merchant explains it.

Most frauds have one of two causes: the payment itself (its amount, its account), or a compromised
merchant. Only the second cause concerns the other payments at the merchant. A small network
estimates the probability of fraud from the payment and its account alone. The probability combines
an explained part with a constant rest r:

    p(x) = r + (1 - r) sigmoid(f(x))

By Bayes' rule a share r / p(x) of the frauds like x belongs to the rest. This share is the merchant
weight, with which a known fraud counts at its merchant (:mod:`model.features.merchant`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.architecture import MERCHANT_WEIGHT_SIZE
from model.features.merchant import REMEMBERED_WEIGHT, WEIGHT_MAX


class MerchantWeightNetwork(nn.Module):
    """Network for the probability of fraud from the payment and its account, and the rest.

    Args:
        inputs: number of payment inputs.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, MERCHANT_WEIGHT_SIZE)
        self.explained = nn.Linear(MERCHANT_WEIGHT_SIZE, 1)
        self.rest = nn.Parameter(torch.zeros(1))

    def log_risk(self, payment: Tensor) -> Tensor:
        """Return the logarithm of p: [n, P] -> [n]."""
        z = self.explained(F.relu(self.hidden(payment))).squeeze(-1)
        # p = 1 - (1 - r)(1 - s), because the two causes are independent.
        neither = F.logsigmoid(-self.rest) + F.logsigmoid(-z)
        return torch.log(-torch.expm1(neither))

    def merchant_weight(self, payment: Tensor) -> NDArray[np.uint8]:
        """Return r / p in parts of :data:`WEIGHT_MAX`: [n, P] -> uint8[n]."""
        with torch.inference_mode():
            share = torch.exp(F.logsigmoid(self.rest) - self.log_risk(payment))
        whole = share.clamp(0.0, 1.0).mul(WEIGHT_MAX).round().numpy().astype(np.uint8)
        whole[whole > REMEMBERED_WEIGHT] = WEIGHT_MAX
        return whole
