"""Clients of a gateway, sync and async."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self

import httpx

from recur_client import requests
from recur_client.calls import Call, Pause, Reply, Send, make_call
from recur_client.deadlines import bound
from recur_client.requests import Fields

TIMEOUT_SECONDS = 30.0
"""Time of a call, if the client has no other."""


def _headers(step: Send) -> dict[str, str]:
    headers = {} if step.body is None else {"Content-Type": "application/json"}
    if step.wait_seconds is not None:
        headers["Prefer"] = f"wait={step.wait_seconds}"
    return headers


class Client:
    """Sync client of a gateway.

    Args:
        address: the gateway's, such as ``https://scores.example.com``.
        key: API key or token.
        timeout_seconds: time of each call, all attempts and pauses together; only the look-up of
            the address's name may take longer.
        transport: httpx transport to use in place of the network.
    """

    def __init__(
        self,
        address: str,
        key: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._http = httpx.Client(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, transport=transport
        )
        self._deadline = bound(self._http)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def score(self, transaction: Fields, *, wait_seconds: int | None = None) -> dict[str, Any]:
        """Score a transaction once, however often it is sent.

        Args:
            transaction: its fields; ``transaction_id`` makes it known again.
            wait_seconds: longest wait of the gateway before the client begins to poll.

        Raises:
            RecurClientError: see :func:`~recur_client.calls.make_call`.
        """
        found: dict[str, Any] = self._run(requests.score(transaction, wait_seconds))
        return found

    def batch(
        self, transactions: Sequence[Fields], *, wait_seconds: int | None = None
    ) -> list[dict[str, Any]]:
        """Score transactions; each has an outcome with a status of its own."""
        found = self._run(requests.batch(transactions, wait_seconds))
        results: list[dict[str, Any]] = found["results"]
        return results

    def get_score(self, transaction_id: str) -> dict[str, Any]:
        """Find a transaction's score; a pending one is waited for."""
        found: dict[str, Any] = self._run(requests.get_score(transaction_id))
        return found

    def what_if(
        self, transaction: Fields, variants: Sequence[Fields] | None = None
    ) -> dict[str, Any]:
        """Return the scores that variants of a transaction would get now."""
        found: dict[str, Any] = self._run(requests.what_if(transaction, variants))
        return found

    def label(self, fields: Fields) -> dict[str, Any]:
        """Report the truth about a transaction."""
        found: dict[str, Any] = self._run(requests.label(fields))
        return found

    def account(self, account_id: str) -> dict[str, Any]:
        """Return an account's standing, counts and recent scores."""
        found: dict[str, Any] = self._run(requests.account(account_id))
        return found

    def alert_page(self, cursor: str | None = None, **query: Any) -> dict[str, Any]:
        """Return a page: ``alerts``, the ``cursor`` after them, and whether there are ``more``."""
        found: dict[str, Any] = self._run(requests.alerts({"cursor": cursor, **query}))
        return found

    def alerts(self, cursor: str | None = None, **query: Any) -> Iterator[dict[str, Any]]:
        """Iterate over the alerts that there are now, page by page.

        Args:
            cursor: where an earlier page ended.
            **query: ``from_``, ``limit``, ``decision``, ``min_score``, ``merchant_id``.
        """
        while True:
            page = self.alert_page(cursor, **query)
            yield from page["alerts"]
            cursor = page["cursor"]
            if not page["more"]:
                return

    def _run(self, request: Send) -> Any:
        call: Call = make_call(request, self._timeout_seconds)
        reply: Reply = None
        while True:
            try:
                step = call.send(reply)
            except StopIteration as end:
                return end.value
            reply = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                reply = self._send(step)

    def _send(self, step: Send) -> Reply:
        try:
            with self._deadline.within(step.timeout_seconds):
                return self._http.request(
                    step.method,
                    step.path,
                    content=step.body,
                    headers=_headers(step),
                    timeout=step.timeout_seconds,
                )
        except httpx.TransportError as error:
            return error


class AsyncClient:
    """Async client of a gateway.

    Args:
        address: the gateway's, such as ``https://scores.example.com``.
        key: API key or token.
        timeout_seconds: time of each call, all attempts and pauses together.
        transport: httpx transport to use in place of the network.
    """

    def __init__(
        self,
        address: str,
        key: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._http = httpx.AsyncClient(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score(
        self, transaction: Fields, *, wait_seconds: int | None = None
    ) -> dict[str, Any]:
        """Score a transaction once, however often it is sent.

        Args:
            transaction: its fields; ``transaction_id`` makes it known again.
            wait_seconds: longest wait of the gateway before the client begins to poll.

        Raises:
            RecurClientError: see :func:`~recur_client.calls.make_call`.
        """
        found: dict[str, Any] = await self._run(requests.score(transaction, wait_seconds))
        return found

    async def batch(
        self, transactions: Sequence[Fields], *, wait_seconds: int | None = None
    ) -> list[dict[str, Any]]:
        """Score transactions; each has an outcome with a status of its own."""
        found = await self._run(requests.batch(transactions, wait_seconds))
        results: list[dict[str, Any]] = found["results"]
        return results

    async def get_score(self, transaction_id: str) -> dict[str, Any]:
        """Find a transaction's score; a pending one is waited for."""
        found: dict[str, Any] = await self._run(requests.get_score(transaction_id))
        return found

    async def what_if(
        self, transaction: Fields, variants: Sequence[Fields] | None = None
    ) -> dict[str, Any]:
        """Return the scores that variants of a transaction would get now."""
        found: dict[str, Any] = await self._run(requests.what_if(transaction, variants))
        return found

    async def label(self, fields: Fields) -> dict[str, Any]:
        """Report the truth about a transaction."""
        found: dict[str, Any] = await self._run(requests.label(fields))
        return found

    async def account(self, account_id: str) -> dict[str, Any]:
        """Return an account's standing, counts and recent scores."""
        found: dict[str, Any] = await self._run(requests.account(account_id))
        return found

    async def alert_page(self, cursor: str | None = None, **query: Any) -> dict[str, Any]:
        """Return a page: ``alerts``, the ``cursor`` after them, and whether there are ``more``."""
        found: dict[str, Any] = await self._run(requests.alerts({"cursor": cursor, **query}))
        return found

    async def alerts(
        self, cursor: str | None = None, **query: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Iterate over the alerts that there are now, page by page.

        Args:
            cursor: where an earlier page ended.
            **query: ``from_``, ``limit``, ``decision``, ``min_score``, ``merchant_id``.
        """
        while True:
            page = await self.alert_page(cursor, **query)
            for alert in page["alerts"]:
                yield alert
            cursor = page["cursor"]
            if not page["more"]:
                return

    async def _run(self, request: Send) -> Any:
        call: Call = make_call(request, self._timeout_seconds)
        reply: Reply = None
        while True:
            try:
                step = call.send(reply)
            except StopIteration as end:
                return end.value
            reply = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                reply = await self._send(step)

    async def _send(self, step: Send) -> Reply:
        try:
            async with asyncio.timeout(step.timeout_seconds):
                return await self._http.request(
                    step.method,
                    step.path,
                    content=step.body,
                    headers=_headers(step),
                    timeout=step.timeout_seconds,
                )
        except TimeoutError:
            return httpx.ReadTimeout("the call's time is over")
        except httpx.TransportError as error:
            return error
