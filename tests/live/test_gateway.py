"""Gateways beside a worker: answers are the scores topic's, and each id is scored once."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import psutil
import pytest
from aiokafka import AIOKafkaProducer

from model.transaction import Transaction
from pipeline.checkpoint import load_checkpoint
from pipeline.gateway.accounts import FORECAST_DAYS
from pipeline.gateway.api_keys import api_key_store, new_key
from pipeline.gateway.incoming import Incoming, TransactionReader
from pipeline.gateway.openapi import EXAMPLE_SCORE, EXAMPLE_TRANSACTION, make_document
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.replies import REPLY_HEADER, StoredAnswer
from pipeline.messages.transactions import encode_transaction
from pipeline.settings import load_settings
from pipeline.storage.answer_store import AnswerStore
from pipeline.storage.client import RedisClient, redis_client
from recur_client import Client
from tests.api.attack import attack
from tests.api.examples import ExampleRequest, check, requests_of
from tests.fakes.redis_traffic import ports_to, watched_commands
from tests.fakes.running_gateway import (
    GatewayProcess,
    Site,
    make_token,
    running_site,
    start_gateway,
)
from tests.fakes.running_pipeline import EVENT_TIME_MS, transactions, until
from tests.fakes.secure_services import Authority
from tests.faults.doors import Caller, compare, requests_for
from tests.pipeline.gateway.calls import exchange
from tests.pipeline.gateway.calls import request as request_bytes

Result = TypeVar("Result")

GATEWAYS = 4
OLD_MS, YOUNG_MS = 60_000, 0
"""Ages of claims: older and younger than a gateway leaves to another one."""

TRAFFIC = 240
"""Requests of the gateways that are not idle."""

OWN_TRAFFIC_BYTES_PER_SECOND = 4_000
"""Most bytes that an idle gateway reads: once a second it asks broker, Redis and the group."""


@pytest.fixture(scope="module")
def site(
    kafka: Kafka, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("gateways")
    settings = {
        "gateway_max_body_bytes": 200_000,
        "gateway_body_timeout_seconds": 2.0,
        "gateway_failed_logins_per_minute": 0,
    }
    with running_site(kafka, redis_server, directory, GATEWAYS, **settings) as site:
        yield site


def fields_of(transaction: Transaction) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(encode_transaction(transaction))
    return fields


async def values_of(site: Site, role: str, transaction_id: str) -> list[bytes]:
    """The records of a topic that name a transaction."""
    name = json.dumps(transaction_id).encode()
    return [r.value for r in await site.under_test.records(role) if name in (r.value or b"")]


def problem_of(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    members = answer.json()
    assert members["request_id"] == answer.headers["x-request-id"]
    assert members["status"] == answer.status_code
    return str(members["type"]).removeprefix("/problems/")


def test_the_answer_is_the_record_of_the_scores_topic(site: Site) -> None:
    async def body() -> None:
        sent = transactions(20, 5, seed=1)
        for i, transaction in enumerate(sent):
            answer = await site.gateways[i % 2].score(transaction)
            assert answer.status_code == 200, answer.text
            assert await values_of(site, "scores", transaction.transaction_id) == [answer.content]
            found = await site.gateways[1 - i % 2].client.get(
                f"/v1/scores/{transaction.transaction_id}"
            )
            assert (found.status_code, found.content) == (200, answer.content)

    site.run(body())


def test_a_score_that_came_through_kafka_is_found(site: Site) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=2)
        await site.under_test.send([transaction])
        await site.under_test.until_applied()
        found = await site.gateways[0].client.get(f"/v1/scores/{transaction.transaction_id}")
        values = await values_of(site, "scores", transaction.transaction_id)
        assert (found.status_code, [found.content]) == (200, values)

        again = await site.gateways[0].score(transaction)  # through the other door
        assert (again.status_code, again.content) == (200, found.content)
        assert await values_of(site, "scores", transaction.transaction_id) == values

    site.run(body())


def test_a_score_that_is_late_is_pending_and_found_at_its_location(site: Site) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=3)
        gateway, other, *_ = site.gateways
        with site.paused_worker():
            answer = await gateway.score(transaction, "respond-async")
            assert answer.status_code == 202, answer.text
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["preference-applied"] == "wait=0"
            location = answer.headers["location"]
            again = await other.score(transaction, "wait=0")
            assert (again.status_code, again.headers["location"]) == (202, location)
            waiting = await other.client.get(location)
            assert waiting.status_code == 202
            assert await values_of(site, "scores", transaction.transaction_id) == []
        scored = await other.client.get(location, headers={"Prefer": "wait=20"})
        assert scored.status_code == 200
        assert await values_of(site, "scores", transaction.transaction_id) == [scored.content]
        assert len(await values_of(site, "transactions", transaction.transaction_id)) == 1

    site.run(body())


def test_parallel_requests_with_one_id_are_scored_once_and_other_content_conflicts(
    site: Site,
) -> None:
    async def body() -> None:
        (first,) = transactions(1, 1, seed=4)
        second = msgspec.structs.replace(first, amount=first.amount + 1)
        calls = [
            site.gateways[i % 2].score(first if i % 3 else second, "wait=20") for i in range(30)
        ]
        answers = await asyncio.gather(*calls)
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 409}
        assert statuses[200] in (10, 20)  # all requests with the body that came first
        assert {problem_of(a) for a in answers if a.status_code == 409} == {"conflict"}
        (value,) = {a.content for a in answers if a.status_code == 200}
        assert await values_of(site, "scores", first.transaction_id) == [value]
        assert len(await values_of(site, "transactions", first.transaction_id)) == 1

    site.run(body())


def test_an_idempotency_key_stands_for_one_body(site: Site) -> None:
    async def body() -> None:
        first, second = transactions(2, 2, seed=5)
        headers = {"Idempotency-Key": f'"{first.transaction_id}"'}
        answer = await site.gateways[0].score(first, **headers)
        again = await site.gateways[1].score(first, **headers)
        assert (answer.status_code, again.content) == (200, answer.content)
        assert again.headers["idempotent-replayed"] == "true"
        other = await site.gateways[1].score(second, **headers)
        assert (other.status_code, problem_of(other)) == (409, "conflict")
        assert await values_of(site, "transactions", second.transaction_id) == []

    site.run(body())


def test_each_transaction_of_a_batch_has_its_own_outcome(site: Site) -> None:
    async def body() -> None:
        first, second, third = transactions(3, 3, seed=6)
        before = await site.gateways[0].score(first)
        changed = fields_of(first) | {"amount": first.amount + 1}
        wrong = fields_of(second) | {"amount": -1}
        answer = await site.gateways[1].client.post(
            "/v1/scores/batch",
            json={"transactions": [fields_of(third), fields_of(first), changed, wrong, 7]},
            headers={"Prefer": "wait=20"},
        )
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        assert [one["status"] for one in results] == [200, 200, 409, 422, 422]
        assert results[1]["score"] == before.json()
        assert results[3]["problem"]["errors"][0]["pointer"] == "/transactions/3/amount"
        assert results[4]["problem"]["errors"][0]["pointer"] == "/transactions/4"
        (value,) = await values_of(site, "scores", third.transaction_id)
        assert value in answer.content

    site.run(body())


def test_a_what_if_is_the_score_that_follows_and_changes_nothing(site: Site) -> None:
    async def body() -> None:
        history = transactions(6, 1, seed=7)
        gateway = site.gateways[0]
        account = f"W{history[0].transaction_id}"
        history = [msgspec.structs.replace(t, account_id=account) for t in history]
        for transaction in history[:-1]:
            assert (await gateway.score(transaction)).status_code == 200
        ends = len(await site.under_test.records("transactions"))
        tried = await gateway.client.post(
            "/v1/what-if",
            json={
                "transaction": fields_of(history[-1]),
                "variants": [{}, {"amount": 90_000}, {"merchant_id": "M-never-seen"}],
            },
        )
        assert tried.status_code == 200, tried.text
        found = tried.json()
        assert found["transactions_seen"] == 5
        assert len(found["variants"]) == 3
        assert found["variants"][1]["score"] > found["variants"][0]["score"]
        assert found["variants"][1]["reasons"]
        assert len(await site.under_test.records("transactions")) == ends
        scored = (await gateway.score(history[-1])).json()
        assert scored["features"]["transactions_seen"] == 6  # the what-if advanced nothing
        assert scored["score"] == pytest.approx(found["variants"][0]["score"], abs=1e-4)

    site.run(body())


@pytest.mark.parametrize(
    ("base", "variants", "status", "pointer"),
    [
        ({"merchant_id": None}, [{"merchant_id": "M000007"}], 422, "/transaction/merchant_id"),
        ({"amount": -1}, [{"amount": 5}], 422, "/transaction/amount"),
        ({"timestamp": "now"}, [{"timestamp": EVENT_TIME_MS}], 422, "/transaction/timestamp"),
        ({"category": 7}, [{"category": "food"}], 422, "/transaction/category"),
        ({}, [{}, {"merchant_id": None}], 422, "/variants/1/merchant_id"),
        ({}, [{"account_id": "another"}], 422, "/variants/0/account_id"),
        ({}, [7], 422, "/variants/0"),
        ({}, [], 422, "/variants"),
        ({}, [{}] * 201, 413, "/variants"),
        ({}, [{}] * 200, 200, None),
    ],
)
def test_a_fault_in_a_what_if_is_named_even_where_each_variant_replaces_it(
    site: Site,
    base: dict[str, object],
    variants: list[object],
    status: int,
    pointer: str | None,
) -> None:
    (transaction,) = transactions(1, 1, seed=9)
    body = {"transaction": fields_of(transaction) | base, "variants": variants}

    answer = site.run(site.gateways[0].client.post("/v1/what-if", json=body))

    assert answer.status_code == status, answer.text
    if pointer is not None:
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]


def test_an_account_shows_its_counts_and_recent_scores(site: Site) -> None:
    async def body() -> None:
        account = "account/ü 1"
        sent = [msgspec.structs.replace(t, account_id=account) for t in transactions(3, 1, seed=8)]
        scores = [(await site.gateways[0].score(t)).content for t in sent]
        answer = await site.gateways[1].client.get("/v1/accounts/account%2F%C3%BC%201")
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["account_id"], found["transactions_seen"]) == (account, 3)
        assert found["last_transaction_at"] == sent[-1].timestamp
        assert [one for one in found["recent_scores"]] == [json.loads(s) for s in scores[::-1]]
        assert len(found["forecast"]) == FORECAST_DAYS
        assert all(day["amount"]["p10"] <= day["amount"]["p90"] for day in found["forecast"])
        unknown = await site.gateways[1].client.get("/v1/accounts/nobody")
        assert (unknown.status_code, problem_of(unknown)) == (404, "not-found")

    site.run(body())


def test_a_label_reaches_the_labels_topic_with_an_audit_record(site: Site) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=9)
        label = {
            "transaction_id": transaction.transaction_id,
            "account_id": transaction.account_id,
            "merchant_id": transaction.merchant_id,
            "label": "fraud",
            "timestamp": transaction.timestamp,
        }
        answer = await site.gateways[0].client.post("/v1/labels", json=label)
        assert answer.status_code == 202, answer.text
        (value,) = await values_of(site, "labels", transaction.transaction_id)
        assert json.loads(value).items() >= label.items()
        request_id = answer.headers["x-request-id"]
        acts = [
            json.loads(r.value)
            for r in await site.under_test.records("audit")
            if request_id.encode() in r.value
        ]
        assert [act["result"] for act in acts] == ["begun", "done"]
        assert all(transaction.account_id not in json.dumps(act) for act in acts)

    site.run(body())


def test_alerts_come_once_each_by_cursor_from_a_time_and_filtered(site: Site) -> None:
    async def body() -> None:
        client = site.gateways[0].client
        sent = [
            msgspec.structs.replace(t, amount=50_000.0, merchant_id="M-alerts")
            for t in transactions(9, 9, seed=10)
        ]
        start_ms = None
        for transaction in sent:
            answer = await site.gateways[0].score(transaction)
            assert answer.json()["decision"] != "approve"
        expected = {t.transaction_id for t in sent}
        wanted: dict[str, Any] = {"merchant_id": "M-alerts", "limit": 2}
        cursor, found = None, []
        for _ in range(100):
            place: dict[str, Any] = {} if cursor is None else {"cursor": cursor}
            page = (await client.get("/v1/alerts", params=wanted | place)).json()
            assert len(page["alerts"]) <= 2
            found += page["alerts"]
            cursor = page["cursor"]
            if not page["more"]:
                break
        assert Counter(a["transaction_id"] for a in found) == Counter(expected)
        assert all(alert["reasons"] for alert in found)
        rest = (await client.get("/v1/alerts", params={"cursor": cursor})).json()
        assert rest["alerts"] == []
        created = sorted(alert["created_at"] for alert in found)
        start_ms = created[-1] + 3_600_000
        none = (await client.get("/v1/alerts", params={"from": start_ms})).json()
        assert none["alerts"] == []
        some = (await client.get("/v1/alerts", params={"from": created[0] - 60_000})).json()
        assert expected <= {alert["transaction_id"] for alert in some["alerts"]}
        high: dict[str, Any] = {"min_score": 1, "decision": "decline"}
        assert (await client.get("/v1/alerts", params=high)).json()["alerts"] == []
        wrong = await client.get("/v1/alerts", params={"cursor": "none"})
        assert (wrong.status_code, problem_of(wrong)) == (400, "invalid-parameter")

    site.run(body())


def test_a_tenant_sees_what_is_its_own(site: Site) -> None:
    async def body() -> None:
        foreign, mine = transactions(2, 2, seed=11)
        mine = msgspec.structs.replace(
            mine, account_id="acme-1", transaction_id=f"acme-{mine.transaction_id}"
        )
        for transaction in (foreign, mine):
            assert (await site.gateways[0].score(transaction)).status_code == 200
        token = await make_token(site.under_test.settings, tenant="acme-")
        headers = {"Authorization": f"Bearer {token}"}
        client = site.gateways[1].client

        async def get(path: str) -> int:
            return (await client.get(path, headers=headers)).status_code

        assert await get(f"/v1/scores/{mine.transaction_id}") == 200
        assert await get(f"/v1/scores/{foreign.transaction_id}") == 404
        assert await get("/v1/accounts/acme-1") == 200
        assert await get(f"/v1/accounts/{foreign.account_id}") == 404
        refused = await site.gateways[0].score(foreign, **headers)
        assert (refused.status_code, problem_of(refused)) == (404, "not-found")

    site.run(body())


@pytest.mark.parametrize(
    ("body", "status", "problem", "pointer"),
    [
        (b"", 400, "not-json", None),
        (b"{", 400, "not-json", ""),
        (b"[]", 422, "invalid-fields", ""),
        (b"[" * 500, 400, "too-deep", ""),
        (b'{"a":"' + b"x" * 250_000 + b'"}', 413, "too-large", ""),
        (b'{"a":"' + b"\xff" + b'"}', 400, "not-json", ""),
        (b'{"transaction_id":"x"}', 422, "invalid-fields", "/account_id"),
        (
            json.dumps(
                {"transaction_id": "x", "account_id": "a", "merchant_id": "m", "amount": -1,
                 "currency": "EUR", "timestamp": EVENT_TIME_MS}
            ).encode(),
            422, "invalid-fields", "/amount",
        ),
    ],
)  # fmt: skip
def test_a_wrong_body_is_a_problem_that_names_the_place(
    site: Site, body: bytes, status: int, problem: str, pointer: str | None
) -> None:
    answer = site.run(site.gateways[0].score(body))

    assert (answer.status_code, problem_of(answer)) == (status, problem)
    if pointer is not None:
        assert answer.json()["errors"][0]["pointer"] == pointer


def test_a_wrong_key_is_401_and_a_missing_scope_is_403(site: Site) -> None:
    async def body() -> None:
        client = site.gateways[0].client
        wrong = {"Authorization": "Bearer recur_0123456789abcdef_wrong"}
        answer = await client.get("/v1/alerts", headers=wrong)
        assert (answer.status_code, problem_of(answer)) == (401, "unauthenticated")
        token = await make_token(site.under_test.settings, ["score"])
        answer = await client.get("/v1/alerts", headers={"Authorization": f"Bearer {token}"})
        assert (answer.status_code, problem_of(answer)) == (403, "forbidden")

    site.run(body())


def test_metrics_count_refusals_and_name_nobody(site: Site) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=12)
        secret = f"secret-{transaction.transaction_id}"
        transaction = msgspec.structs.replace(transaction, account_id=secret)
        gateway = site.gateways[0]
        assert (await gateway.score(transaction)).status_code == 200
        assert (await gateway.client.get(f"/v1/accounts/{secret}")).status_code == 200
        assert (await gateway.client.get("/nowhere")).status_code == 404
        metrics = (await gateway.client.get("/metrics")).text
        assert 'recur_gateway_problems_total{problem="not-found"}' in metrics
        assert 'route="/v1/scores",status="200"' in metrics
        assert "recur_gateway_ready 1.0" in metrics
        for text in (metrics, gateway.log()):
            assert secret not in text
            assert transaction.transaction_id not in text

    site.run(body())


def incoming_of(site: Site, transaction: Transaction) -> Incoming:
    """Read a transaction as the gateways do."""
    settings, checkpoint = site.under_test.settings, site.under_test.scorer.checkpoint
    reader = TransactionReader(settings, checkpoint, settings.topic_partitions)
    return reader.read(encode_transaction(transaction))


async def leave_claim(site: Site, incoming: Incoming, age_ms: int) -> None:
    """Leave a claim as a gateway does that died right after it."""
    client = RedisClient(redis_client(site.under_test.settings))
    try:
        store = AnswerStore(client, site.under_test._keys(), expiry_ms=600_000)
        claim = StoredAnswer("P", incoming.content, time.time_ns() // 1_000_000 - age_ms)
        before = await store.read(incoming.partition, incoming.transaction_id)
        if before is not None:
            await store.replace(incoming.partition, incoming.transaction_id, before, None)
        assert await store.claim([(incoming.partition, incoming.transaction_id, claim)]) == [None]
    finally:
        await client.close()


async def taken_over(site: Site) -> float:
    name = "recur_gateway_claims_taken_over_total"
    return sum([await gateway.metric(name) for gateway in site.gateways])


def test_a_claim_of_a_gateway_that_died_before_it_produced_is_taken_over_once(
    site: Site,
) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=13)
        await leave_claim(site, incoming_of(site, transaction), OLD_MS)
        path = f"/v1/scores/{transaction.transaction_id}"
        nothing = await site.gateways[0].client.get(path)
        assert (nothing.status_code, problem_of(nothing)) == (404, "not-found")
        before = await taken_over(site)
        calls = [site.gateways[i % GATEWAYS].score(transaction) for i in range(12)]
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {200}
        (value,) = {answer.content for answer in answers}
        assert await values_of(site, "scores", transaction.transaction_id) == [value]
        assert len(await values_of(site, "transactions", transaction.transaction_id)) == 1
        assert await taken_over(site) == before + 1

    site.run(body())


def test_what_a_gateway_produced_before_it_died_is_not_produced_again(site: Site) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=14)
        incoming = incoming_of(site, transaction)
        before = await taken_over(site)
        with site.paused_worker():
            await leave_claim(site, incoming, OLD_MS)
            await site.under_test.send_records(
                [(incoming.key, incoming.value)], headers=[(REPLY_HEADER, b"dead")]
            )
            for gateway in site.gateways[:2]:
                answer = await gateway.score(transaction, "wait=0")
                assert answer.status_code == 202, answer.text
        answers = [await gateway.score(transaction) for gateway in site.gateways]
        assert {answer.status_code for answer in answers} == {200}
        (value,) = {answer.content for answer in answers}
        assert await values_of(site, "scores", transaction.transaction_id) == [value]
        assert len(await values_of(site, "transactions", transaction.transaction_id)) == 1
        assert await taken_over(site) == before

    site.run(body())


def test_a_young_claim_without_a_record_is_in_doubt_and_blocks_nothing_else(site: Site) -> None:
    async def body() -> None:
        first, second = transactions(2, 2, seed=15)
        claimed = incoming_of(site, first)
        await leave_claim(site, claimed, YOUNG_MS)
        answer = await site.gateways[0].score(first, "wait=0")
        assert (answer.status_code, problem_of(answer)) == (503, "in-doubt")
        assert int(answer.headers["retry-after"]) >= 1
        changed = msgspec.structs.replace(first, amount=first.amount + 1)
        conflict = await site.gateways[1].score(changed, "wait=0")
        assert (conflict.status_code, problem_of(conflict)) == (409, "conflict")
        batch = await site.gateways[2].client.post(
            "/v1/scores/batch",
            json={"transactions": [fields_of(first), fields_of(second)]},
            headers={"Prefer": "respond-async"},
        )
        doubted, scored = batch.json()["results"]
        assert (doubted["status"], doubted["problem"]["type"]) == (503, "/problems/in-doubt")
        assert scored["status"] in (200, 202)
        assert await values_of(site, "transactions", first.transaction_id) == []

        await leave_claim(site, claimed, OLD_MS)  # as time would
        answer = await site.gateways[3].score(first)
        assert answer.status_code == 200, answer.text
        assert await values_of(site, "scores", first.transaction_id) == [answer.content]

    site.run(body())


def test_who_waits_for_a_claim_that_is_withdrawn_produces_the_record(site: Site) -> None:
    async def body() -> None:
        (transaction,) = transactions(1, 1, seed=16)
        incoming = incoming_of(site, transaction)
        await leave_claim(site, incoming, YOUNG_MS)
        waiting = "recur_gateway_transactions_waiting"
        calls = [asyncio.create_task(gateway.score(transaction)) for gateway in site.gateways]

        async def all_wait() -> bool:
            return all([await gateway.metric(waiting) == 1 for gateway in site.gateways])

        await until(all_wait, "all gateways to wait for the claim")
        (key,) = site.under_test._keys().answers(incoming.partition, [transaction.transaction_id])
        client = redis_client(site.under_test.settings)
        await client.delete(key)
        await client.aclose()
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {200}
        (value,) = {answer.content for answer in answers}
        assert await values_of(site, "scores", transaction.transaction_id) == [value]
        assert len(await values_of(site, "transactions", transaction.transaction_id)) == 1

    site.run(body())


def test_a_score_that_its_kafka_transaction_holds_back_is_pending_until_it_is_committed(
    site: Site,
) -> None:
    async def body() -> None:
        settings = site.under_test.settings
        (transaction,) = transactions(1, 1, seed=32)
        incoming = incoming_of(site, transaction)
        place = incoming.partition, [transaction.transaction_id]
        value = json.dumps({**EXAMPLE_SCORE, **fields_of(transaction)}, separators=(",", ":"))
        path = f"/v1/scores/{transaction.transaction_id}"
        client = redis_client(settings)
        async with AIOKafkaProducer(
            **settings.kafka_client_options(), transactional_id=transaction.transaction_id
        ) as producer:
            async with producer.transaction():
                sent = await producer.send_and_wait(
                    settings.topic("scores"), value.encode(), partition=incoming.partition
                )
                answer = StoredAnswer("A", incoming.content, sent.offset).to_bytes()
                await client.set(site.under_test._keys().answers(*place)[0], answer, px=600_000)
                for gateway in site.gateways[:2]:
                    assert (await gateway.score(transaction, "wait=0")).status_code == 202
                    assert (await gateway.client.get(path)).status_code == 202
                waiting = asyncio.create_task(site.gateways[2].score(transaction))
                await asyncio.sleep(0)
        await client.aclose()
        found = await waiting
        again = await site.gateways[0].client.get(path, headers={"Prefer": "wait=20"})
        assert (found.status_code, again.status_code) == (200, 200), found.text
        assert found.content == again.content == value.encode()
        assert await values_of(site, "transactions", transaction.transaction_id) == []

    site.run(body())


@dataclass(frozen=True)
class Effort:
    """Bytes that a gateway's process read from all its connections and files, and its CPU time."""

    bytes_read: int | None
    cpu_seconds: float

    @classmethod
    def of(cls, gateway: GatewayProcess) -> Effort:
        process = psutil.Process(gateway.process.pid)
        counted = getattr(process, "io_counters", None)  # not on every system
        times = process.cpu_times()
        return cls(counted().read_chars if counted else None, times.user + times.system)


def test_a_gateway_hears_and_reads_only_what_belongs_to_its_own_requests(
    site: Site, redis_server: Redis, record_property: Callable[[str, object], None]
) -> None:
    async def body() -> None:
        *busy, idle = site.gateways
        sent = transactions(TRAFFIC, 40, seed=17)
        shares = [sent[i :: len(busy)] for i in range(len(busy))]
        keys = site.under_test._keys()
        partitions = range(site.under_test.settings.topic_partitions)
        id_of_key = {
            key.decode(): t.transaction_id
            for t in sent
            for p in partitions
            for key in keys.answers(p, [t.transaction_id])
        }
        ports = [ports_to(redis_server, g.process.pid) for g in site.gateways]
        assert all(ports)
        replies = await idle.metric("recur_gateway_replies_total")
        efforts, start = [Effort.of(g) for g in site.gateways], time.monotonic()
        with watched_commands(redis_server) as commands:
            answers = await asyncio.gather(
                *(g.score(t) for g, share in zip(busy, shares, strict=True) for t in share)
            )
            seconds = time.monotonic() - start
            after = [Effort.of(g) for g in site.gateways]
        assert {answer.status_code for answer in answers} == {200}

        # What each gateway asks Redis for, and what workers publish to its channel.
        run = sent[0].transaction_id.partition("-")[0]
        for gateway, own, mine in zip(site.gateways, [*shares, []], ports, strict=True):
            (channel,) = re.findall(r"gateway=([0-9a-f]{16})", gateway.log())[-1:]
            ids = {t.transaction_id for t in own}
            asked = [c for c in commands if c.port in mine]
            named = {
                key for c in asked for key in re.findall(r'"([^"]+=[0-9a-f]{32})"', c.arguments)
            }
            assert {id_of_key[key] for key in named} == ids
            heard = [
                c.arguments for c in commands if c.name == "PUBLISH" and channel in c.arguments
            ]
            assert {n for text in heard for n in re.findall(rf"{run}-\d+", text)} == ids
        own_commands = Counter(c.name for c in commands if c.port in ports[-1])
        assert set(own_commands) <= {"PING"}
        assert await idle.metric("recur_gateway_replies_total") == replies

        # All that it reads, from the broker too: what it asks each second, and no more.
        spent = [b.cpu_seconds - a.cpu_seconds for a, b in zip(efforts, after, strict=True)]
        record_property("cpu_seconds", spent)
        record_property("seconds", seconds)
        if after[-1].bytes_read is not None:
            read = [
                (b.bytes_read or 0) - (a.bytes_read or 0)
                for a, b in zip(efforts, after, strict=True)
            ]
            record_property("bytes_read", read)
            everything = sum(len(answer.content) for answer in answers)
            allowed = OWN_TRAFFIC_BYTES_PER_SECOND * (seconds + 1)
            assert read[-1] <= allowed
            assert min(read[:-1]) > everything / len(busy)

    site.run(body())


def test_expired_and_revoked_keys_are_refused_while_the_gateway_runs(site: Site) -> None:
    async def body() -> None:
        now_ms = time.time_ns() // 1_000_000
        expired, expired_token = new_key("old", ["read"], expires_ms=now_ms + 1, now_ms=now_ms)
        revoked, revoked_token = new_key("lost", ["read"])
        client = site.gateways[0].client

        async def status(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            return (await client.get("/v1/alerts", headers=headers)).status_code

        async with api_key_store(site.under_test.settings) as store:
            await store.add(expired)
            await store.add(revoked)
            assert await status(expired_token) == 401
            assert await status(revoked_token) == 200
            await store.revoke(revoked.id)

        async def is_refused() -> bool:
            return await status(revoked_token) == 401

        await until(is_refused, "the revoked key to be refused")

    site.run(body())


def test_clients_that_are_slow_greedy_or_gone_hold_up_nobody(site: Site) -> None:
    async def body() -> None:
        gateway = site.gateways[0]
        port, token = gateway.port, gateway.token
        cut, gone, served = transactions(3, 3, seed=18)
        whole = encode_transaction(cut)
        limit = 200_000
        _reader, deaf = await asyncio.open_connection("127.0.0.1", port)
        wanted = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        deaf.write(wanted * 80)  # and never reads
        flood = exchange(port, wanted * 5_000)
        _, half = await asyncio.open_connection("127.0.0.1", port)
        half.write(request_bytes(token, whole[: len(whole) // 2], len(whole)))
        await half.drain()
        half.close()
        _, left = await asyncio.open_connection("127.0.0.1", port)
        left.write(request_bytes(token, encode_transaction(gone)))
        await left.drain()
        left.close()
        chunked = request_bytes(token, b"").replace(
            b"Content-Length: 0", b"Transfer-Encoding: chunked"
        )
        endless = b"%x\r\n%s\r\n" % (limit // 4, b" " * (limit // 4))
        slow, large, greedy, garbage, flooded, answer = await asyncio.gather(
            exchange(port, request_bytes(token, b"{", 100)),
            exchange(port, request_bytes(token, b"", limit + 1)),
            exchange(port, chunked, *[endless] * 6),
            exchange(port, b"\x16\x03\x01 no HTTP\r\n\r\n"),
            flood,
            gateway.score(served),
        )
        assert answer.status_code == 200
        assert slow.startswith(b"HTTP/1.1 408 ")
        assert large.startswith(b"HTTP/1.1 413 ")
        assert greedy.startswith(b"HTTP/1.1 413 ") or greedy == b""  # closed while it still sent
        assert garbage.startswith(b"HTTP/1.1 400 ")
        assert flooded.count(b"HTTP/1.1 200 ") < 5_000  # the connection ended
        deaf.transport.abort()
        assert await values_of(site, "transactions", cut.transaction_id) == []
        found = await gateway.score(gone)  # it is scored once, whether or not its sender listens
        assert await values_of(site, "scores", gone.transaction_id) == [found.content]
        assert " error " not in gateway.log()

    site.run(body())


def test_the_gateway_speaks_tls_with_its_own_certificate(site: Site, tmp_path: Path) -> None:
    async def body() -> None:
        authority = Authority.create(tmp_path)
        certificate, key = authority.issue(tmp_path, "gateway")
        trusted = ssl.create_default_context(cafile=authority.cafile)
        token = site.gateways[0].token
        gateway = await start_gateway(
            site.under_test, token, trusted,
            gateway_ssl_certfile=certificate, gateway_ssl_keyfile=key,
        )  # fmt: skip
        try:
            await gateway.until_ready()
            (transaction,) = transactions(1, 1, seed=19)
            answer = await gateway.score(transaction)
            assert (answer.status_code, answer.url.scheme) == (200, "https")
            assert (await site.gateways[0].score(transaction)).content == answer.content
            transport = httpx.HTTPTransport(verify=trusted)
            with Client(gateway.address, token, transport=transport) as client:
                found = await asyncio.to_thread(client.get_score, transaction.transaction_id)
            assert found == answer.json()
            for address in (gateway.address, gateway.address.replace("https", "http")):
                async with httpx.AsyncClient(trust_env=False) as stranger:
                    with pytest.raises(httpx.TransportError):
                        await stranger.get(f"{address}/live")
            assert await gateway.stop() == 0  # although the clients' connections are open
            assert "exceeded" not in gateway.log()
        finally:
            await gateway.close()

    site.run(body())


def test_a_gateway_without_a_usable_certificate_says_so_and_ends(
    site: Site, tmp_path: Path
) -> None:
    async def body() -> None:
        authority = Authority.create(tmp_path)
        certificate, _ = authority.issue(tmp_path, "gateway")
        _, other = authority.issue(tmp_path, "other")
        _, encrypted = authority.issue(tmp_path, "encrypted", password="secret-password")
        keys = {other: "SSLError", tmp_path / "none.key": "FileNotFoundError",
                certificate: "SSLError", encrypted: "encrypted"}  # fmt: skip
        started = [
            await start_gateway(
                site.under_test, "", gateway_ssl_certfile=certificate, gateway_ssl_keyfile=key
            )
            for key in keys
        ]
        for gateway, says in zip(started, keys.values(), strict=True):
            status = await asyncio.to_thread(gateway.process.wait, 60)
            log = gateway.log()
            assert status not in (0, None)
            assert says in log
            assert "RECUR_GATEWAY_SSL_KEYFILE" in log
            assert "Traceback" not in log
            await gateway.close()

    site.run(body())


def test_both_doors_give_the_same_answers_while_one_of_two_workers_is_killed(site: Site) -> None:
    """The fault `two-doors` does it with 10,000 transactions, and checks all states."""

    async def body() -> None:
        under_test = site.under_test
        under_test.use(kafka_session_timeout_seconds=3.0)
        (killed,) = await under_test.start_workers(1)
        over_http, stream = transactions(300, 60, seed=30), transactions(300, 60, seed=31)
        requests = requests_for([encode_transaction(t) for t in over_http], GATEWAYS)
        caller = Caller([gateway.client for gateway in site.gateways], requests)

        async def half_is_answered() -> bool:
            return caller.done >= len(requests) / 2

        running = asyncio.create_task(caller.run())
        sending = asyncio.create_task(under_test.send(stream, rate=100))
        try:
            await until(half_is_answered, "half of the answers", pause_seconds=0.01)
        finally:
            await asyncio.to_thread(killed.process.kill)
        await asyncio.gather(running, sending)
        await under_test.until_applied()
        assert any(request.pended for request in requests), "nobody waited for the killed worker"
        assert caller.complaints == []
        scores: dict[str, list[bytes]] = {}
        for record in await under_test.records("scores"):
            scores.setdefault(json.loads(record.value)["transaction_id"], []).append(record.value)
        assert [*compare(requests, scores)] == []
        assert {len(scores[t.transaction_id]) for t in stream} == {1}
        for i, transaction in enumerate(stream[::10]):
            name = transaction.transaction_id
            found = await site.gateways[i % GATEWAYS].client.get(f"/v1/scores/{name}")
            assert [found.content] == scores[name]

    site.run(body())


DOCUMENT = make_document(load_settings(), load_checkpoint(load_settings()))


@pytest.mark.parametrize("example", [*requests_of(DOCUMENT)], ids=lambda one: one.operation)
def test_each_example_of_the_document_runs(site: Site, example: ExampleRequest) -> None:
    async def body() -> None:
        client = site.gateways[0].client
        known = await client.post(
            "/v1/scores", json=EXAMPLE_TRANSACTION, headers={"Prefer": "wait=20"}
        )
        assert known.status_code == 200, known.text
        answer = await client.request(
            example.method, example.path, json=example.body, headers=example.headers
        )
        assert answer.status_code in range(200, 300), answer.text
        schema = example.answers[answer.status_code]
        if schema is not None:
            check(DOCUMENT, schema, answer.json())

    site.run(body())


def test_nothing_is_found_by_requests_made_from_the_document(site: Site) -> None:
    async def body() -> None:
        token = await make_token(site.under_test.settings)
        found = await attack(site.gateways[0].address, token, examples=20)
        assert found.status == 0, found.output
        assert found.requests > 100, found.output
        assert " error " not in site.gateways[0].log()

    site.run(body())
