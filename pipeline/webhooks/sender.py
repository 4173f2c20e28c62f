"""One attempt to deliver a webhook: resolve, check the address, connect, post, read the status.

Each attempt makes a connection of its own. So the name is resolved and the address is checked each
time, and nothing is reused. Redirects are not followed, proxies and cookies are not used, and a
response's body is read only so far that the receiver can finish.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.webhooks.addresses import AddressPolicy, ForbiddenAddressError
from pipeline.webhooks.endpoints import Endpoint
from pipeline.webhooks.schedule import retry_after_seconds
from pipeline.webhooks.signing import signed_headers

ResultName = Literal[
    "delivered", "redirect", "gone", "slow_down", "client_error", "server_error", "other_status",
    "timeout", "address", "dns", "tls", "connection", "protocol",
]  # fmt: skip
RESULTS: tuple[ResultName, ...] = get_args(ResultName)
"""All results of an attempt, as metrics name them."""

SLOW_DOWN = frozenset({429, 502, 503, 504})
"""Statuses that slow an endpoint down."""

GONE = 410
"""Status that disables an endpoint."""

BODY_MAX_BYTES = 4096
"""Most bytes of a response's body that are read. They are dropped."""

BODY_SECONDS = 1.0
"""Longest wait for them, so that a receiver cannot hold a delivery that it has answered."""

HEADER_MAX_BYTES = 8190
RESOLVER_THREADS = 2
"""Threads that resolve an endpoint's name. They are its own: a slow name server of one endpoint
holds up no other."""

USER_AGENT = "recur-webhooks"

GetAddresses = Callable[[str, int], Sequence[tuple[Any, ...]]]
"""Resolver of host and port, with the results of :func:`socket.getaddrinfo`."""


@dataclass(frozen=True)
class Attempt:
    """The outcome of one attempt.

    Attributes:
        result: one of :data:`RESULTS`.
        status: the response's status; None without a response.
        retry_after_seconds: what the endpoint asked for, seconds.
        seconds: duration.
    """

    result: ResultName
    status: int | None = None
    retry_after_seconds: float | None = None
    seconds: float = 0.0

    @property
    def is_delivered(self) -> bool:
        """Whether the endpoint took the event."""
        return self.result == "delivered"

    def __str__(self) -> str:
        return self.result if self.status is None else f"{self.result} (status {self.status})"


def get_addresses(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    """Resolve a host with the system's resolver."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class CheckedResolver(AbstractResolver):
    """A resolver that returns permitted addresses only.

    Args:
        policy: the permitted addresses.
        executor: threads for the resolving.
        lookup: resolves; it may block.
    """

    def __init__(
        self, policy: AddressPolicy, executor: ThreadPoolExecutor, lookup: GetAddresses
    ) -> None:
        self._policy = policy
        self._executor = executor
        self._lookup = lookup

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve a host.

        Raises:
            ForbiddenAddressError: it has no permitted address.
            OSError: it cannot be resolved.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._executor, self._lookup, host, port)
        results = [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=0, flags=0
            )
            for kind, _, _, _, address in found
            if self._policy.permits(str(address[0]))
        ]
        if not results:
            raise ForbiddenAddressError("no permitted address")
        return results

    async def close(self) -> None:
        """Do nothing: the sender owns the threads."""


class Sender:
    """Sender of an endpoint's webhooks.

    Args:
        endpoint: the destination.
        timeout_seconds: limit of an attempt as a whole.
        connections: most connections at a time.
        lookup: resolves names.
        clock: wall clock, epoch seconds.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        timeout_seconds: float,
        connections: int = 1,
        lookup: GetAddresses = get_addresses,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._endpoint = endpoint
        self._policy = endpoint.policy
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._executor = ThreadPoolExecutor(RESOLVER_THREADS, "recur-webhooks-dns")
        connector = aiohttp.TCPConnector(
            limit=connections,
            force_close=True,
            use_dns_cache=False,
            family=socket.AF_UNSPEC,
            resolver=CheckedResolver(self._policy, self._executor, lookup),
            socket_factory=self._open_socket,
            ssl=endpoint.tls_context() if endpoint.url.startswith("https:") else True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),
            max_line_size=HEADER_MAX_BYTES,
            max_field_size=HEADER_MAX_BYTES,
            headers={"User-Agent": USER_AGENT},
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _open_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """Open a socket for an address that is about to be connected to; check it once more.

        Raises:
            ForbiddenAddressError: the address is not permitted.
        """
        family, kind, proto, _, place = address
        if not self._policy.permits(str(place[0])):
            raise ForbiddenAddressError("the address is not permitted")
        return socket.socket(family, kind, proto)

    async def send(
        self, message_id: str, body: bytes, more_headers: Mapping[str, str] = {}
    ) -> Attempt:
        """Make one attempt; return its outcome, whatever happens.

        Args:
            message_id: the webhook's id.
            body: the event.
            more_headers: headers that the signature does not cover.
        """
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                result, status, patience = await self._post(message_id, body, more_headers)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            result, status, patience = _failure(error), None, None
        return Attempt(result, status, patience, time.perf_counter() - begin)

    async def _post(
        self, message_id: str, body: bytes, more_headers: Mapping[str, str]
    ) -> tuple[ResultName, int, float | None]:
        self._check_literal()
        now = self._clock()
        headers = {
            **more_headers,
            **signed_headers(message_id, int(now), body, self._endpoint.signers),
            "Content-Type": "application/json",
        }
        async with self._session.post(
            self._endpoint.url, data=body, headers=headers, allow_redirects=False
        ) as response:
            status = response.status
            patience = retry_after_seconds(response.headers.get("Retry-After"), now)
            await _drain(response)
        return _result_of(status), status, patience

    def _check_literal(self) -> None:
        """Check a host that is an address: aiohttp does not resolve it.

        Raises:
            ForbiddenAddressError: it is not permitted.
        """
        host = urlsplit(self._endpoint.url).hostname or ""
        try:
            address = ip_address(host)
        except ValueError:
            return  # a name, or a text that aiohttp refuses as an address
        if not self._policy.permits(str(address)):
            raise ForbiddenAddressError("the address is not permitted")


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read a little of the body and drop it. The status has decided already."""
    left = BODY_MAX_BYTES
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while left > 0 and (chunk := await response.content.read(left)):
                left -= len(chunk)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return  # a body that is cut off, or lies about its length, changes nothing


def _result_of(status: int) -> ResultName:
    if 200 <= status < 300:
        return "delivered"
    if status == GONE:
        return "gone"
    if status in SLOW_DOWN:
        return "slow_down"
    if 300 <= status < 400:
        return "redirect"
    if 400 <= status < 500:
        return "client_error"
    return "server_error" if 500 <= status < 600 else "other_status"


_ERRORS: tuple[tuple[type[BaseException], ResultName], ...] = (
    (ForbiddenAddressError, "address"),
    (TimeoutError, "timeout"),
    (ssl.SSLError, "tls"),
    (ssl.CertificateError, "tls"),
    (aiohttp.ClientSSLError, "tls"),
    (aiohttp.ServerFingerprintMismatch, "tls"),
    (socket.gaierror, "dns"),
    (aiohttp.ClientConnectorDNSError, "dns"),
    (aiohttp.InvalidURL, "address"),
    (aiohttp.ServerDisconnectedError, "connection"),
    (aiohttp.ClientResponseError, "protocol"),
    (aiohttp.ClientPayloadError, "protocol"),
    (OSError, "connection"),
    (aiohttp.ClientError, "connection"),
    (ValueError, "protocol"),
)


def _failure(error: BaseException) -> ResultName:
    """Name an error, or the one that caused it."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        inner = getattr(following, "os_error", None)
        following = inner if isinstance(inner, BaseException) else following.__cause__
    for kind, name in _ERRORS[:2]:
        if any(isinstance(each, kind) for each in chain):
            return name
    return next(name for kind, name in _ERRORS if isinstance(error, kind))
