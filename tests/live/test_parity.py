"""Parity: the running system publishes the scores of an offline computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from tests.fakes.offline import TOLERANCE, Log, run


def test_100_000_transactions_with_late_labels_get_their_offline_scores(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    log = Log.simulated(100_000, customers=2_600, terminals=1_000, seed=11)

    parity = run(kafka.bootstrap, redis_server.url, tmp_path, log)

    print(parity)
    assert parity.labels > 500, "labels must come in time to matter"
    known_frauds = parity.merchant_raw[:, 6]
    assert np.count_nonzero(known_frauds) > 1_000
    assert parity.features_that_differ == 0
    assert parity.largest_difference <= TOLERANCE
    assert parity.weights > 20, "frauds of equal weight would prove nothing"
    assert np.ptp(parity.offline) > 0.2, "equal scores would prove nothing"
