"""Each fraud of the demo becomes known once, after its delay in simulated time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from pipeline.demo.labels import DelayedLabels
from pipeline.replay.producer import Feed
from pipeline.replay.simulated import SimulatedStream

DAY_MS = 86_400_000


class FakeFeed:
    """Feed that keeps the labels it gets."""

    def __init__(self) -> None:
        self.labels: list[dict[str, Any]] = []

    async def send(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        labels = [json.loads(value) for value in values]
        assert [label["merchant_id"].encode() for label in labels] == list(keys)
        self.labels += labels


def test_each_fraud_becomes_known_once_and_not_before_its_time() -> None:
    stream = SimulatedStream(300, 200, "2020-01-01", seed=3)
    pieces = [stream.take_days(4), stream.take_days(5)]
    sent = FakeFeed()
    labels = DelayedLabels(cast(Feed, sent), 2 * DAY_MS)
    begin = int(pieces[0].columns.timestamp_ms[0]) // DAY_MS * DAY_MS

    async def run() -> None:
        labels.add(pieces[0])
        for hour in range(11 * 24):
            if hour == 4 * 24:
                labels.add(pieces[1])
            now_ms = begin + hour * 3_600_000
            await labels.send_until(now_ms)
            assert all(label["labelled_at"] <= now_ms for label in sent.labels)
            known = sum(
                int(
                    (
                        (p.columns.scenario > 0) & (p.columns.timestamp_ms + 2 * DAY_MS <= now_ms)
                    ).sum()
                )
                for p in pieces[: 1 + (hour >= 4 * 24)]
            )
            assert len(sent.labels) == known == labels.sent

    asyncio.run(run())
    frauds = np.concatenate([piece.columns.scenario > 0 for piece in pieces])
    expected = [int(number) for number in np.flatnonzero(frauds)]
    assert [int(label["transaction_id"][1:]) for label in sent.labels] == expected
    for label in sent.labels:
        assert label["labelled_at"] - label["timestamp"] == 2 * DAY_MS
        assert label["label"] == "fraud"
