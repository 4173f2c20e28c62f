"""Fitting of the merchant weight network (:mod:`model.merchant_weight`)."""

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
"""Initial logit of the explained part, relative to that of the share of fraud.

The rest starts at the share of fraud itself. A constant probability could belong to either part;
this start leaves it with the rest."""

GRADIENT_NORM_MAX = 1.0
REPORT_EVERY = 100


def fit_merchant_weight(
    inputs_at: Callable[[NDArray[np.intp]], Tensor],
    is_fraud: NDArray[np.bool_],
    inputs: int,
    seed: int,
    show: Callable[[float], None] = lambda _: None,
) -> MerchantWeightNetwork:
    """Fit the network to n labelled transactions of the training period, in seconds.

    Args:
        inputs_at: gives the payment inputs [m, I] of transactions [m], on the CPU.
        is_fraud: [n].
        inputs: number I of payment inputs.
        seed: decides the first weights and the batches.
        show: called with the share done.
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
        log_p = network.log_risk(inputs_at(rows))
        log_not = torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))
        fraud = truth[rows]
        loss = -(fraud * log_p + (1 - fraud) * log_not).mean()
        optimizer.update(torch.autograd.grad(loss, parameters), GRADIENT_NORM_MAX)
        if update % REPORT_EVERY == 0:
            show(update / UPDATES)
    return network.eval().requires_grad_(False)
