"""The client against a gateway and a worker; the examples of its README run too."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from standardwebhooks import Webhook

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.transactions import encode_transaction
from recur_client import AsyncClient, Client, ProblemError
from recur_client.kafka import Blocking, Stream, alerts, scores
from tests.fakes.running_gateway import Site, running_site
from tests.fakes.running_pipeline import transactions

Result = TypeVar("Result")
CALL_SECONDS = 60.0


@pytest.fixture(scope="module")
def site(
    kafka: Kafka, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("client")
    with running_site(kafka, redis_server, directory) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(
        site.gateways[0].address, site.gateways[0].token, timeout_seconds=CALL_SECONDS
    ) as client:
        yield client


def fields(count: int, seed: int, **changes: Any) -> list[dict[str, Any]]:
    """Transactions of one account that no other test has, as fields."""
    made = transactions(count, 1, seed)
    account = f"account/ü {made[0].transaction_id}"
    return [
        json.loads(
            encode_transaction(msgspec.structs.replace(t, **{"account_id": account, **changes}))
        )
        for t in made
    ]


def test_a_repeated_score_is_equal_and_applied_once(site: Site, client: Client) -> None:
    (one,) = fields(1, seed=1)

    async def again() -> dict[str, Any]:
        async with AsyncClient(
            site.gateways[0].address, site.gateways[0].token, timeout_seconds=CALL_SECONDS
        ) as other:
            return await other.score(one)

    first = client.score(one)

    assert 0 < first["score"] < 1
    assert client.score(one) == first == client.get_score(one["transaction_id"])
    assert site.run(again()) == first
    assert client.account(one["account_id"])["transactions_seen"] == 1


def test_a_changed_transaction_under_a_known_id_is_a_conflict(client: Client) -> None:
    (one,) = fields(1, seed=2)
    client.score(one)

    with pytest.raises(ProblemError) as caught:
        client.score({**one, "amount": one["amount"] + 1})
    assert (caught.value.status, caught.value.kind) == (409, "conflict")
    assert caught.value.request_id


def test_a_batch_has_an_outcome_for_each(client: Client) -> None:
    good, bad = fields(2, seed=3)
    results = client.batch([good, {**bad, "amount": -1}], wait_seconds=20)

    assert [one["status"] for one in results] == [200, 422]
    assert results[0]["score"] == client.get_score(good["transaction_id"])


def test_a_what_if_changes_nothing(client: Client) -> None:
    *history, last = fields(4, seed=4)
    for one in history:
        client.score(one)

    found = client.what_if(last, [{}, {"amount": 90_000}])
    assert found["variants"][1]["score"] > found["variants"][0]["score"]
    assert client.account(last["account_id"])["transactions_seen"] == 3
    score = client.score(last)["score"]
    assert score == pytest.approx(found["variants"][0]["score"], abs=1e-4)


def test_an_account_shows_its_recent_scores(client: Client) -> None:
    sent = fields(3, seed=5)
    scores = [client.score(one) for one in sent]

    assert client.account(sent[0]["account_id"])["recent_scores"] == scores[::-1]
    with pytest.raises(ProblemError, match="404"):
        client.account("nobody")


def test_a_label_reaches_its_topic(site: Site, client: Client) -> None:
    (one,) = fields(1, seed=6)
    names = ("transaction_id", "account_id", "merchant_id", "timestamp")
    label = {**{name: one[name] for name in names}, "label": "fraud"}
    client.label(label)

    found = [json.loads(record.value) for record in site.run(site.under_test.records("labels"))]
    assert [one for one in found if one.items() >= label.items()]


def test_alerts_come_once_each_and_go_on_from_a_cursor(client: Client) -> None:
    sent = fields(5, seed=7, amount=50_000.0, merchant_id="M-alerts")
    for one in sent:
        assert client.score(one)["decision"] != "approve"

    found = list(client.alerts(merchant_id="M-alerts", limit=2))
    assert sorted(a["transaction_id"] for a in found) == sorted(t["transaction_id"] for t in sent)
    page = client.alert_page(merchant_id="M-alerts", limit=100)
    assert list(client.alerts(page["cursor"], merchant_id="M-alerts")) == []


def test_a_wrong_key_and_a_wrong_field_are_told(site: Site, client: Client) -> None:
    with Client(site.gateways[0].address, "recur_0123456789abcdef_wrong") as stranger:
        calls: list[Callable[[], Any]] = [
            lambda: stranger.score(fields(1, seed=8)[0]),
            lambda: stranger.account("A1"),
            lambda: list(stranger.alerts()),
        ]
        for call in calls:
            with pytest.raises(ProblemError) as caught:
                call()
            assert (caught.value.status, caught.value.kind) == (401, "unauthenticated")
    with pytest.raises(ProblemError) as caught:
        client.score({**fields(1, seed=9)[0], "amount": -1})
    assert [error.pointer for error in caught.value.errors] == ["/amount"]


async def read(stream: Stream, count: int, fails: bool = False) -> list[str]:
    """The sources of the next records; the last of them is not done if the reader fails."""
    found: list[str] = []
    try:
        async with asyncio.timeout(CALL_SECONDS), stream:
            async for record in stream:
                found.append(record["source"])
                if len(found) == count:
                    break
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        found.pop()
    return found


def test_an_interrupted_stream_goes_on_without_loss_or_repetition(
    site: Site, client: Client
) -> None:
    async def body() -> None:
        settings = site.under_test.settings
        await asyncio.to_thread(client.batch, [f for n in range(8) for f in fields(2, 20 + n)])
        written = [json.loads(r.value)["source"] for r in await site.under_test.records("scores")]
        assert len(written) >= 16

        def stream() -> Stream:
            return scores(settings.kafka_bootstrap_servers, "s", topic=settings.topic("scores"))

        found = await read(stream(), 3)
        found += await read(stream(), 5, fails=True)
        found += await read(stream(), 1)
        found += await read(stream(), len(written) - len(found))
        assert sorted(found) == sorted(written)

    site.run(body())


async def read_and_die(stream: Stream, count: int, saves: int) -> list[str]:
    """The sources of the next records; the reader dies in work on the last, after some saves."""
    found: list[str] = []
    async with asyncio.timeout(CALL_SECONDS):
        await stream.__aenter__()
        stream._saved = float("inf")  # no second passes
        async for record in stream:
            found.append(record["source"])
            if len(found) == count:
                break
            if len(found) <= saves:
                await stream.save()
        await stream._consumer.stop()  # as a death does, but without the wait for the session's end
    return found


def test_after_a_death_nothing_is_lost_and_what_was_saved_does_not_come_again(
    site: Site, client: Client
) -> None:
    async def body() -> None:
        settings = site.under_test.settings
        await asyncio.to_thread(client.batch, fields(8, seed=60))
        written = [json.loads(r.value)["source"] for r in await site.under_test.records("scores")]

        def stream(group: str) -> Stream:
            servers = settings.kafka_bootstrap_servers
            return scores(servers, group, topic=settings.topic("scores"))

        before = await read_and_die(stream("each"), 6, saves=5)
        after = await read(stream("each"), len(written) - 5)
        assert sorted(before[:5] + after) == sorted(written)  # only the last in work came again

        before = await read_and_die(stream("some"), 6, saves=2)
        after = await read(stream("some"), len(written) - 2)
        assert sorted(before[:2] + after) == sorted(written)

        with Blocking(stream("blocking")) as blocking:
            first = next(blocking)["source"]
            await asyncio.to_thread(blocking.save)
            await asyncio.to_thread(blocking._run, blocking._stream._consumer.stop())
        assert sorted([first, *await read(stream("blocking"), len(written) - 1)]) == sorted(written)

    site.run(body())


def test_a_repeated_alert_is_read_once_and_a_new_group_begins_at_a_time(
    site: Site, client: Client
) -> None:
    sent = fields(3, seed=40, amount=50_000.0)
    for one in sent:
        client.score(one)

    async def body() -> None:
        settings = site.under_test.settings
        topic = settings.topic("alerts")

        def stream(group: str, since_ms: int | None = None) -> Stream:
            servers = settings.kafka_bootstrap_servers
            return alerts(servers, group, topic=topic, since_ms=since_ms)

        written = await site.under_test.records("alerts")
        before = [json.loads(record.value)["source"] for record in written]
        assert sorted(await read(stream("a"), len(before))) == sorted(before)
        now_ms = max(record.timestamp for record in written) + 1
        async with AIOKafkaProducer(**settings.kafka_client_options()) as producer:
            for record in written:  # as a worker does that died after it had published them
                await producer.send_and_wait(
                    topic, record.value, record.key, record.partition, record.timestamp
                )
            for partition in range(settings.topic_partitions):
                value = json.dumps({"source": f"last-{partition}"}).encode()
                await producer.send_and_wait(
                    topic, value, partition=partition, timestamp_ms=now_ms + 1_000
                )
        last = [f"last-{partition}" for partition in range(settings.topic_partitions)]
        assert sorted(await read(stream("a"), len(last))) == last
        assert sorted(await read(stream("b", now_ms + 500), len(last))) == last

    site.run(body())


def test_the_examples_of_the_readme_run(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    settings = site.under_test.settings
    text = (Path(__file__).parents[2] / "client/README.md").read_text()
    for name, value in {
        '"https://scores.example.com"': repr(site.gateways[0].address),
        '"YOUR-KEY"': repr(site.gateways[0].token),
        '"kafka:9092"': repr(settings.kafka_bootstrap_servers),
        '"ops"': f'"ops", topic={settings.topic("alerts")!r}',
        '"ops-2"': f'"ops-2", topic={settings.topic("alerts")!r}',
    }.items():
        assert name in text
        text = text.replace(name, value)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```python")
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "client/README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert "t-1001" in printed
    assert len(printed) == 6, printed
    now = datetime.now(UTC)
    secret = re.findall(r'"(whsec_[^"]+)"', text)[0]
    body = json.dumps({"source": "a:0:1"})
    signed = {
        "webhook-id": "m1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign("m1", now, body),
    }
    assert names["receive"](body.encode(), signed)["source"] == "a:0:1"
