"""Score an account's transactions one by one, with the model alone: no Kafka, no Redis.

An account's history and hidden state are all that the model remembers of it. A worker keeps both in
Redis; here they are two variables.
"""

import sys
from pathlib import Path

import numpy as np

from model.checkpoint import Checkpoint
from model.features.account import AccountHistory, observe
from model.features.merchant import MerchantProfiles, observe_merchants
from model.stepper import sigmoid
from pipeline.settings import SHIPPED_CHECKPOINT

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000
AMOUNTS = (12.50, 9.90, 14.20, 11.00, 10.40, 13.10, 2400.00)


def score(checkpoint: Checkpoint, amounts: tuple[float, ...]) -> list[float]:
    """Score payments of one account, a day apart, each at a merchant without a known fraud."""
    features = checkpoint.header.features
    history = AccountHistory.empty(1)
    hidden = checkpoint.stepper.empty_hidden(1)
    scores = []
    for day, amount in enumerate(amounts):
        now_ms = np.array([START_MS + day * 24 * HOUR_MS])
        account, history = observe(history, np.array([amount]), now_ms, features.scale)
        merchant = observe_merchants(
            MerchantProfiles.empty(1), np.array([0]), now_ms, features.label_delay_ms
        )
        raw = np.hstack((account, merchant))
        logit, hidden = checkpoint.stepper.step(checkpoint.encode(raw), hidden)
        hidden = hidden.astype(np.float16)  # as a worker stores it
        scores.append(float(sigmoid(logit)[0]))
    return scores


if __name__ == "__main__":
    model = Checkpoint.load(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED_CHECKPOINT)
    thresholds = model.header.thresholds
    for paid, probability in zip(AMOUNTS, score(model, AMOUNTS), strict=True):
        alert = " alert" if probability >= thresholds.review else ""
        print(f"{paid:10.2f}  {probability:.4f}{alert}")
