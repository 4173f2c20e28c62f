"""Answers on a real broker and Redis: the key and the reply name the score's own bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.replies import (
    REPLY_HEADER,
    Reply,
    StoredAnswer,
    content_hash,
    decode_replies,
)
from pipeline.messages.scores import decode_score
from pipeline.messages.transactions import encode_transaction
from pipeline.storage.client import redis_client
from tests.fakes.running_pipeline import PipelineUnderTest, transactions

pytestmark = pytest.mark.live


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_each_answer_names_the_published_score_of_its_record(
    guarantee: str, kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    system = PipelineUnderTest(
        kafka.bootstrap, redis_server.url, tmp_path, processing_guarantee=guarantee
    )
    sent = transactions(400, accounts=40)
    asking = [(t.account_id.encode(), encode_transaction(t)) for t in sent[::2]]
    silent = [(t.account_id.encode(), encode_transaction(t)) for t in sent[1::2]]

    async def run() -> None:
        keys = system._keys()
        client = redis_client(system.settings)
        async with client.pubsub(ignore_subscribe_messages=True) as heard:
            await heard.subscribe(keys.replies("gw-1"))
            await heard.get_message(timeout=10)  # None: the confirmation is left out
            async with system.running(workers=1):
                headers = [(REPLY_HEADER, b"gw-1")]
                await asyncio.gather(
                    system.send_records(asking, rate=500, headers=headers),
                    system.send_records(silent, rate=500),
                )
                await system.until_applied()
                published = {
                    decode_score(r.value).transaction_id: r for r in await system.records("scores")
                }
            replies: list[Reply] = []
            while len(replies) < len(asking):
                message = await heard.get_message(timeout=10)
                assert message is not None, f"{len(replies)} replies came"
                replies += decode_replies(message["data"])
        assert {r.transaction_id: (r.kind, r.offset, r.value) for r in replies} == {
            t.transaction_id: (
                "A",
                published[t.transaction_id].offset,
                published[t.transaction_id].value,
            )
            for t in sent[::2]
        }
        for t, (_, value) in zip(sent[::2], asking, strict=True):
            score = published[t.transaction_id]
            stored = await client.get(keys.answers(score.partition, [t.transaction_id])[0])
            assert stored is not None
            expected = StoredAnswer("A", content_hash(value), score.offset)
            assert StoredAnswer.from_bytes(stored) == expected
        for t in sent[1::2]:
            score = published[t.transaction_id]
            assert await client.get(keys.answers(score.partition, [t.transaction_id])[0]) is None
        await client.aclose()

    asyncio.run(run())
