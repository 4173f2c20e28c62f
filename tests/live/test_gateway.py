"""Gateways beside a worker: answers are the scores topic's, and each id is scored once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import httpx
import msgspec
import pytest

from model.transaction import Transaction
from pipeline.gateway.accounts import FORECAST_DAYS
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.transactions import encode_transaction
from tests.api.attack import attack
from tests.fakes.running_gateway import Site, make_token, running_site
from tests.fakes.running_pipeline import EVENT_TIME_MS, transactions

Result = TypeVar("Result")


@pytest.fixture(scope="module")
def site(
    kafka: Kafka, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("gateways")
    with running_site(kafka, redis_server, directory, 2, gateway_max_body_bytes=200_000) as site:
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
        gateway, other = site.gateways
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


def test_nothing_is_found_by_requests_made_from_the_document(site: Site) -> None:
    async def body() -> None:
        token = await make_token(site.under_test.settings)
        found = await attack(site.gateways[0].address, token, examples=20)
        assert found.status == 0, found.output
        assert found.requests > 100, found.output
        assert " error " not in site.gateways[0].log()

    site.run(body())
