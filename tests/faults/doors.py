"""Fault with both doors open: transactions over HTTP and from Kafka while a worker is killed."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from pipeline.gateway.api_keys import api_key_store, new_key
from pipeline.local.workers import LocalGateway
from pipeline.settings import Settings
from tests.faults.fault import WORKER_DEATH_SECONDS, Fault
from tests.faults.harness import Harness, require_effect
from tests.faults.invariants import topic_records
from tests.faults.monitor import StuckError

GATEWAYS = 2
CALLERS = 32
"""Requests that are under way at once."""

REPEATED_EVERY = 5
"""Distance between two transactions that are sent several times in parallel."""

CONFLICTING_EVERY = 7
"""Distance between two that have a companion in parallel: another amount under the same id."""

ANSWER_LIMIT_SECONDS = 240.0
RECENT = 10
"""Last transactions of each partition that came from Kafka, and are then asked for over HTTP."""


@dataclass
class Request:
    """A body that is posted, and what came of it.

    Attributes:
        body: the transaction.
        gateway: number of the gateway.
        answer: the score's bytes; None: another body has the id.
        pended: whether the score was not there within the first wait.
    """

    body: bytes
    gateway: int
    answer: bytes | None = None
    pended: bool = False

    @property
    def transaction_id(self) -> str:
        """Id in the body."""
        return str(json.loads(self.body)["transaction_id"])

    @property
    def amount(self) -> float:
        """Amount in the body."""
        return float(json.loads(self.body)["amount"])


def requests_for(values: Sequence[bytes], gateways: int) -> list[Request]:
    """Make the requests of transactions, with those that repeat and contradict them beside them."""
    made = []
    for i, value in enumerate(values):
        copies = 3 if i % REPEATED_EVERY == 0 else 1
        made += [Request(value, (i + copy) % gateways) for copy in range(copies)]
        if i % CONFLICTING_EVERY == 0:
            fields = json.loads(value)
            changed = json.dumps({**fields, "amount": fields["amount"] + 1}).encode()
            made.insert(-1, Request(changed, i % gateways))
    return made


@dataclass
class Caller:
    """Sender of requests that goes on until each has its answer.

    Attributes:
        done: number of requests with an answer.
        complaints: answers that no request should get.
    """

    clients: Sequence[httpx.AsyncClient]
    requests: Sequence[Request]
    done: int = 0
    complaints: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Send all requests, some at once.

        Raises:
            StuckError: a request has no answer in time.
        """
        waiting = deque(self.requests)

        async def call() -> None:
            while waiting:
                await self._send(waiting.popleft())
                self.done += 1

        try:
            async with asyncio.timeout(ANSWER_LIMIT_SECONDS):
                await asyncio.gather(*(call() for _ in range(CALLERS)))
        except TimeoutError as error:
            left = len(self.requests) - self.done
            raise StuckError(f"{left:,} requests have no answer") from error

    async def _send(self, request: Request) -> None:
        client = self.clients[request.gateway]
        answer = await client.post("/v1/scores", content=request.body)
        while answer.status_code in (202, 503):
            request.pended = True
            place = answer.headers.get("location")
            if place is None:
                await asyncio.sleep(float(answer.headers["retry-after"]))
                answer = await client.post("/v1/scores", content=request.body)
            else:
                answer = await client.get(place, headers={"Prefer": "wait=5"})
        if answer.status_code == 200:
            request.answer = answer.content
        elif answer.status_code != 409 or "another body" not in answer.text:
            self.complaints.append(f"status {answer.status_code}: {answer.text}")


class TwoDoors(Fault):
    """Transactions through both doors; a worker dies while half of the requests are answered."""

    name = "two-doors"
    what = "10,000 transactions over HTTP beside those from Kafka; SIGKILL to a worker in between"
    workers = 2
    rate = 400.0
    history = 50_000
    ready_within = WORKER_DEATH_SECONDS

    def __init__(self) -> None:
        self._caller = Caller((), ())

    async def disturb(self, harness: Harness) -> None:
        await harness.workload.stop()
        requests = requests_for(harness.workload.take(len(harness.times(10_000))), GATEWAYS)
        await harness.workload.start(harness.rate)
        gateways = await harness.pool.start_gateways(GATEWAYS)
        token = await _token(harness.settings)
        clients = [_client(gateway, token) for gateway in gateways]
        self._caller = caller = Caller(clients, requests)
        running = asyncio.create_task(caller.run())
        try:
            while caller.done < len(requests) / 2 and not running.done():
                harness.fraction = caller.done / len(requests)
                await asyncio.sleep(0.01)
            await harness.pool.kill(harness.any_worker())
            await harness.recover(await harness.mark())
            while not running.done():
                harness.fraction = caller.done / len(requests)
                await asyncio.sleep(0.1)
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        pended = sum(request.pended for request in requests)
        require_effect(pended > 0, "no request waited for the worker that died")
        harness.notes.append(
            f"{len(requests):,} requests, {pended:,} of them answered later than the first wait,"
            f" {sum(request.answer is None for request in requests):,} refused as conflicts"
        )

    async def check(self, harness: Harness) -> list[str]:
        caller = self._caller
        scores: dict[str, list[bytes]] = {}
        last: dict[int, deque[str]] = {}
        ids = {request.transaction_id for request in caller.requests}
        async for records in topic_records(harness.settings, "scores"):
            for record in records:
                name = json.loads(record.value)["transaction_id"]
                scores.setdefault(name, []).append(record.value)
                if name not in ids:
                    last.setdefault(record.partition, deque(maxlen=RECENT)).append(name)
        wrong = [*caller.complaints, *compare(caller.requests, scores)]
        for i, name in enumerate(name for names in last.values() for name in names):
            answer = await caller.clients[i % GATEWAYS].get(f"/v1/scores/{name}")
            if scores[name] != [answer.content]:
                wrong.append(f"{name} from Kafka: the answer is not the record")
        for client in caller.clients:
            await client.aclose()
        return wrong[:5] + [f"{len(wrong):,} wrong answers in all"] * bool(wrong)


def compare(requests: Sequence[Request], scores: Mapping[str, Sequence[bytes]]) -> Iterator[str]:
    """Describe each request whose answer is not the one record of its transaction."""
    for request in requests:
        name = request.transaction_id
        found = scores.get(name, ())
        if len(found) != 1:
            yield f"{name} has {len(found)} scores"
        elif request.answer not in (None, found[0]):
            yield f"{name}: the answer is not the record"
        elif (request.answer is None) == (json.loads(found[0])["amount"] == request.amount):
            yield f"{name}: another body won, or this one lost to it"


async def _token(settings: Settings) -> str:
    key, token = new_key("fault", ["score"], rate="none")
    async with api_key_store(settings) as store:
        await store.add(key)
    return token


def _client(gateway: LocalGateway, token: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=gateway.base_url,
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        timeout=ANSWER_LIMIT_SECONDS,
        limits=httpx.Limits(max_connections=CALLERS),
        trust_env=False,
    )
