"""The job with Faust alone, on asyncio Redis.

``event``: an agent that handles one event at a time, each with one Redis read, one Redis write and
one send. ``take``: an agent that handles batches of Faust's ``take``, each with one MGET and one
pipeline of writes, and one send for each score.

    PEER_MODE=event PEER_BROKER=... python -m benchmarks.peers.stock_faust worker
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import faust
import numpy as np
import redis.asyncio as redis_asyncio

from benchmarks.peers.batch_scorer import PeerNetwork, PeerSettings
from model.features.spec import FEATURES

TAKE_MAX = 1000
TAKE_WITHIN_SECONDS = 0.05

settings = PeerSettings.read()
network = PeerNetwork(settings)
states: Any = redis_asyncio.Redis.from_url(settings.redis_url)

app = faust.App(
    settings.group,
    broker=f"kafka://{settings.broker}",
    autodiscover=False,
    web_enabled=False,
    store="memory://",
    datadir=tempfile.gettempdir(),
    topic_disable_leader=True,
    consumer_auto_offset_reset="earliest",
)


class Payment(faust.Record, serializer="json"):  # type: ignore[call-arg,misc]
    """A transaction, decoded by Faust."""

    transaction_id: str
    account_id: str
    merchant_id: str
    amount: float
    currency: str
    timestamp: int


payments = app.topic(settings.transactions, value_type=Payment, key_type=bytes)
scores = app.topic(settings.scores, key_type=bytes, value_serializer="json")


def _key(payment: Payment) -> str:
    return f"stock:{payment.account_id}"


def _score(
    values: list[bytes | None], batch: list[Payment]
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Compute new states of distinct accounts, and scores as JSON objects."""
    amounts = np.array([payment.amount for payment in batch])
    times = np.array([payment.timestamp for payment in batch])
    scores, raw, new = network.step(network.decode(values), amounts, times)
    results = [
        {
            "transaction_id": payment.transaction_id,
            "account_id": payment.account_id,
            "merchant_id": payment.merchant_id,
            "amount": payment.amount,
            "timestamp": payment.timestamp,
            "score": score,
            "features": dict(zip(FEATURES, row, strict=True)),
        }
        for payment, score, row in zip(batch, scores.tolist(), raw.tolist(), strict=True)
    ]
    return [state.tobytes() for state in new], results


async def score_events(stream: faust.StreamT[Payment]) -> None:
    """Score one event at a time."""
    async for payment in stream:
        value = await states.get(_key(payment))
        (state,), (score,) = _score([value], [payment])
        await scores.send(key=payment.account_id.encode(), value=score)
        await states.set(_key(payment), state)


async def score_batches(stream: faust.StreamT[Payment]) -> None:
    """Score batches; an account's second payment in a batch waits for the next round."""
    async for batch in stream.take(TAKE_MAX, within=TAKE_WITHIN_SECONDS):
        keys = list({_key(payment) for payment in batch})
        states_by_key = dict(zip(keys, await states.mget(keys), strict=True))
        while batch:
            round_of = {_key(payment): payment for payment in reversed(batch)}
            new_states, results = _score(
                [states_by_key[key] for key in round_of], list(round_of.values())
            )
            for (key, payment), state, score in zip(
                round_of.items(), new_states, results, strict=True
            ):
                states_by_key[key] = state
                await scores.send(key=payment.account_id.encode(), value=score)
            scored = {id(payment) for payment in round_of.values()}
            batch = [payment for payment in batch if id(payment) not in scored]
        async with states.pipeline(transaction=False) as pipeline:
            for key, state in states_by_key.items():
                pipeline.set(key, state)
            await pipeline.execute()


app.agent(payments)(score_batches if os.environ["PEER_MODE"] == "take" else score_events)

if __name__ == "__main__":
    app.main()
