"""Fits the network of merchant weights (:mod:`model.merchant_weight`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.merchant_weight import MerchantWeightNetwork
from model.training.adamw import AdamW

BATCH = 1024
UPDATES = 4000
LEARNING_RATE = 3e-3
EXPLAINED_START = -3.0
"""The logit of what payments explain begins so far under that of the share of fraud, and the rest
at it. So what no input explains stays with the rest: a constant could be either."""

GRADIENT_NORM_MAX = 1.0
REPORT_EVERY = 100


def fit_merchant_weight(
    own_at: Callable[[NDArray[np.intp]], Tensor],
    is_fraud: NDArray[np.bool_],
    inputs: int,
    seed: int,
    show: Callable[[float], None] = lambda _: None,
) -> MerchantWeightNetwork:
    """Fit the network to n labelled transactions of the training period, in seconds.

    Args:
        own_at: gives the inputs [m, I] of transactions [m], on the CPU.
        is_fraud: [n].
        show: called with the share that is done.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MerchantWeightNetwork(inputs)
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
