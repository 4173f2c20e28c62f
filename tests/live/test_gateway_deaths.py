"""A gateway that is killed, and a Redis or broker that is away, lose nothing that was accepted.

A client of each kind calls all the time: to it an outage is only a longer wait.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from model.transaction import Transaction
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.transactions import encode_transaction
from recur_client import AsyncClient, Client
from tests.fakes.running_gateway import GatewayProcess, Site, running_site
from tests.fakes.running_pipeline import transactions, until

ACCEPTED = 10
CALL_SECONDS = 120.0

QUICK = {"gateway_produce_seconds": 1.0, "redis_timeout_seconds": 1.0}
"""Settings with which a gateway finds out soon that a service does not answer."""


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture(scope="module")
def site(kafka: Kafka, redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("deaths")
    with running_site(kafka, redis, directory, 2, **QUICK) as site:
        yield site


class Callers:
    """Calls of the clients, sync and async, that are under way at a gateway."""

    def __init__(self, gateway: GatewayProcess, sync: Transaction, other: Transaction) -> None:
        self.sent = [sync, other]
        self._stack = AsyncExitStack()
        bodies = [json.loads(encode_transaction(one)) for one in self.sent]
        place = gateway.address, gateway.token
        self._client = Client(*place, timeout_seconds=CALL_SECONDS)
        self._async = AsyncClient(*place, timeout_seconds=CALL_SECONDS)
        self._calls = [
            asyncio.create_task(asyncio.to_thread(self._client.score, bodies[0], wait_seconds=5)),
            asyncio.create_task(self._async.score(bodies[1], wait_seconds=5)),
        ]

    async def scores(self) -> list[dict[str, Any]]:
        """Wait for the answers, which the clients ask for until they come."""
        try:
            return list(await asyncio.gather(*self._calls))
        finally:
            self._client.close()
            await self._async.close()


async def scored_once(site: Site, sent: Sequence[Transaction]) -> dict[str, bytes]:
    """Check that each transaction has one score; return the records by transaction."""
    found: dict[str, list[bytes]] = {}
    for record in await site.under_test.records("scores"):
        found.setdefault(json.loads(record.value)["transaction_id"], []).append(record.value)
    assert {t.transaction_id: len(found.get(t.transaction_id, ())) for t in sent} == {
        t.transaction_id: 1 for t in sent
    }
    return {name: values[0] for name, values in found.items()}


async def accept(gateway: GatewayProcess, sent: Sequence[Transaction]) -> list[str]:
    """Have a gateway accept transactions; return where their scores will be."""
    answers = [await gateway.score(one, "respond-async") for one in sent]
    assert {answer.status_code for answer in answers} == {202}
    return [answer.headers["location"] for answer in answers]


async def check_found(
    site: Site, sent: Sequence[Transaction], locations: Sequence[str], records: dict[str, bytes]
) -> None:
    """Check that every gateway finds the scores, byte for byte, by place and by body."""
    for one, location in zip(sent, locations, strict=True):
        for gateway in site.gateways:
            found = await gateway.client.get(location, headers={"Prefer": "wait=20"})
            again = await gateway.score(one)
            assert (found.status_code, again.status_code) == (200, 200), again.text
            assert found.content == again.content == records[one.transaction_id]
            assert again.headers["idempotent-replayed"] == "true"


def test_a_killed_gateway_loses_nothing_and_finds_its_answers_when_it_is_back(
    site: Site,
) -> None:
    async def body() -> None:
        killed, _ = site.gateways
        before, pending = (transactions(ACCEPTED, 5, seed=s) for s in (21, 22))
        calls = transactions(2, 2, seed=23)
        answers = [await killed.score(one) for one in before]
        assert {answer.status_code for answer in answers} == {200}
        with site.paused_worker():
            locations = await accept(killed, pending)
            callers = Callers(killed, *calls)

            async def are_waiting() -> bool:
                return await killed.metric("recur_gateway_transactions_waiting") == 2

            await until(are_waiting, "the clients' calls to wait for their scores")
            await killed.kill()
        killed.restart()
        scores = await callers.scores()
        await killed.until_ready()

        everything = [*before, *pending, *calls]
        records = await scored_once(site, everything)
        assert scores == [json.loads(records[one.transaction_id]) for one in calls]
        assert [a.content for a in answers] == [records[one.transaction_id] for one in before]
        places = [f"/v1/scores/{one.transaction_id}" for one in before]
        await check_found(site, [*before, *pending], [*places, *locations], records)
        sent = [json.loads(r.value) for r in await site.under_test.records("transactions")]
        assert len([r for r in sent if r["transaction_id"] == calls[0].transaction_id]) == 1

    site.run(body())


@pytest.mark.parametrize(
    ("service", "missing", "problem"),
    [("redis", "redis", "store-unavailable"), ("kafka", "broker", "log-unavailable")],
)
def test_without_a_service_the_answer_is_503_until_it_is_back(
    site: Site, request: pytest.FixtureRequest, service: str, missing: str, problem: str
) -> None:
    server: Redis | Kafka = request.getfixturevalue(service)

    async def body() -> None:
        gateway, other = site.gateways
        before, tried, refused, *calls = transactions(5, 5, seed=24)
        pending = transactions(ACCEPTED, 5, seed=25)
        counter = f'recur_gateway_problems_total{{problem="{problem}"}}'
        first = await gateway.score(before)
        assert first.status_code == 200

        async def is_known() -> bool:
            ready = [await one.client.get("/ready") for one in (gateway, other)]
            return all(missing in one.json()["missing"] for one in ready)

        async def clients_failed() -> bool:
            return await gateway.metric(counter) >= count + 2

        with site.paused_worker():
            locations = await accept(gateway, pending)
            server.pause()
        try:
            answer = await gateway.score(tried, "wait=1")
            assert (answer.status_code, answer.json()["type"]) == (503, f"/problems/{problem}")
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) > 0
            await until(is_known, f"/ready to miss {missing}")
            answer = await other.score(refused)
            assert (answer.status_code, answer.json()["type"]) == (503, f"/problems/{problem}")
            count = await gateway.metric(counter)
            callers = Callers(gateway, *calls)
            await until(clients_failed, "the clients to meet the outage")
        finally:
            server.resume()
        scores = await callers.scores()
        await asyncio.gather(*(one.until_ready() for one in site.gateways))

        again = await gateway.score(tried)
        while service == "kafka" and again.status_code == 503:  # it may or may not be in the log
            assert again.json()["type"] == "/problems/in-doubt"
            await asyncio.sleep(int(again.headers["retry-after"]))
            again = await gateway.score(tried)
        assert again.status_code == 200, again.text
        records = await scored_once(site, [before, tried, *calls, *pending])
        assert refused.transaction_id not in records  # it was refused, and not half done
        assert again.content == records[tried.transaction_id]
        assert scores == [json.loads(records[one.transaction_id]) for one in calls]
        assert (await other.score(before)).content == first.content
        await check_found(site, pending, locations, records)

    site.run(body())
