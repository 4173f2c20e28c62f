"""The same job as a Recur worker's, as one writes it with Faust alone: the reference.

``event``: an agent that handles one event at a time, with one Redis read, one Redis write
and one send for each. ``take``: the same in batches by Faust's ``take``, with one MGET and
one pipeline of writes for a batch, and one send for each score.

    STOCK_MODE=event STOCK_BROKER=... STOCK_REDIS=... python -m benchmarks.stock_faust worker
"""

from __future__ import annotations

import os
import tempfile

import faust
import numpy as np
import redis.asyncio as redis_asyncio
import torch

from model.checkpoint import Checkpoint
from model.features import FEATURES
from pipeline.scorer import MicroBatch, Scorer
from pipeline.settings import SHIPPED_CHECKPOINT

TAKE_MAX = 1000
TAKE_WITHIN_SECONDS = 0.05
TTL_MS = 30 * 86_400_000

torch.set_num_threads(1)
scorer = Scorer(Checkpoint.load(SHIPPED_CHECKPOINT), TTL_MS)
states = redis_asyncio.Redis.from_url(os.environ["STOCK_REDIS"])

app = faust.App(
    os.environ["STOCK_GROUP"],
    broker=f"kafka://{os.environ['STOCK_BROKER']}",
    autodiscover=False,
    web_enabled=False,
    store="memory://",
    datadir=tempfile.gettempdir(),
    topic_disable_leader=True,
    consumer_auto_offset_reset="earliest",
)


class Payment(faust.Record, serializer="json"):
    """A transaction, decoded by Faust."""

    transaction_id: str
    account_id: str
    merchant_id: str
    amount: float
    currency: str
    timestamp: int


payments = app.topic(os.environ["STOCK_TRANSACTIONS"], value_type=Payment, key_type=bytes)
scores = app.topic(os.environ["STOCK_SCORES"], key_type=bytes, value_serializer="json")


def _key(payment: Payment) -> str:
    return f"stock:{payment.account_id}"


def _score(values: list[bytes | None], batch: list[tuple[int, Payment]]) -> tuple[list[bytes], ...]:
    """New states, and scores as JSON objects."""
    times = np.array([p.timestamp for _, p in batch], np.int64)
    columns = MicroBatch(
        row=np.array([row for row, _ in batch], np.intp),
        amount=np.array([p.amount for _, p in batch], np.float64),
        timestamp_ms=times,
        record_ms=times,
        offset=np.arange(len(batch), dtype=np.int64),
        id_hash=np.arange(1, len(batch) + 1, dtype=np.uint64) + np.uint64(times[0]),
    )
    after, scored, _, _ = scorer.score(values, columns)
    said = [
        {
            "transaction_id": payment.transaction_id,
            "account_id": payment.account_id,
            "merchant_id": payment.merchant_id,
            "amount": payment.amount,
            "timestamp": payment.timestamp,
            "score": float(score),
            "features": dict(zip(FEATURES, raw.tolist(), strict=True)),
        }
        for (_, payment), score, raw in zip(batch, scored.score, scored.raw, strict=True)
    ]
    return scorer.codec.encode(after, np.arange(len(after))), said  # type: ignore[return-value]


async def score_events(stream: faust.StreamT[Payment]) -> None:
    """One event at a time."""
    async for payment in stream:
        value = await states.get(_key(payment))
        (state,), (score,) = _score([value], [(0, payment)])
        await scores.send(key=payment.account_id.encode(), value=score)
        await states.set(_key(payment), state)


async def score_batches(stream: faust.StreamT[Payment]) -> None:
    """Batches by ``take``."""
    async for batch in stream.take(TAKE_MAX, within=TAKE_WITHIN_SECONDS):
        row_of: dict[str, int] = {}
        rows = [(row_of.setdefault(_key(payment), len(row_of)), payment) for payment in batch]
        new_states, said = _score(await states.mget(list(row_of)), rows)
        for (_, payment), score in zip(rows, said, strict=True):
            await scores.send(key=payment.account_id.encode(), value=score)
        async with states.pipeline(transaction=False) as pipeline:
            for key, state in zip(row_of, new_states, strict=True):
                pipeline.set(key, state)
            await pipeline.execute()


app.agent(payments)(score_batches if os.environ["STOCK_MODE"] == "take" else score_events)

if __name__ == "__main__":
    app.main()
