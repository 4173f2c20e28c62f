"""A connection to a broker that costs little for each request and answer.

aiokafka reads an answer with three wake-ups of a task, packs and unpacks a request field by field,
and guards each one with a context manager. A fetch and a produce request of a small poll took
0.2 ms of it. This connection splits what arrives into answers at once, and sends packed requests.

Importing this module changes all of aiokafka's connections in the process.
"""

from __future__ import annotations

import asyncio
import functools
import struct
import weakref
from collections.abc import Callable, Mapping
from io import BytesIO
from time import monotonic
from typing import Any, Protocol

from aiokafka import conn
from aiokafka.errors import KafkaConnectionError

Versions = Mapping[int, tuple[int, int]]
"""Lowest and highest version that a broker knows of each request, by its key."""

INT32 = struct.Struct(">i")
_HEADER = struct.Struct(">ihhih")


class Answer(Protocol):
    """A decoder of the answers to a kind of request."""

    @classmethod
    def decode(cls, data: memoryview) -> Any:
        """Decode what follows the header of an answer."""


class Packed:
    """A request that is bytes already, as it waits for its answer.

    Attributes:
        RESPONSE_TYPE: decodes the answer; aiokafka's name. aiokafka does not decode it.
    """

    def __init__(self, key: int, version: int, body: bytes, answer: type[Answer]) -> None:
        self.key = key
        self.version = version
        self.body = body
        self.RESPONSE_TYPE = answer

    def parse_response_header(self, stream: BytesIO) -> _AnswerHeader:
        """Read the header of the answer; aiokafka calls this."""
        return _AnswerHeader(*INT32.unpack(stream.read(INT32.size)))


class Packable:
    """A request that can pack itself."""

    def pack(self, versions: Versions) -> Packed | None:
        """Return the packed request; None to have aiokafka pack it for an older broker."""
        raise NotImplementedError


class _AnswerHeader:
    __slots__ = ("correlation_id",)

    def __init__(self, correlation_id: int) -> None:
        self.correlation_id = correlation_id


class _Answers(asyncio.Protocol):
    """Splits the bytes of a connection into answers.

    Args:
        on_answer: called with each answer, without its length.
        on_end: called once, with the error that ended the connection.
    """

    def __init__(
        self, on_answer: Callable[[bytes], None], on_end: Callable[[BaseException], None]
    ) -> None:
        self._on_answer = on_answer
        self._on_end = on_end
        self._rest = bytearray()

    def data_received(self, data: bytes) -> None:
        """Handle the next bytes; almost always they are one answer."""
        rest = self._rest
        if not rest and len(data) >= INT32.size:
            (size,) = INT32.unpack_from(data)
            if len(data) == INT32.size + size:
                self._on_answer(data[INT32.size :])
                return
        rest += data
        while len(rest) >= INT32.size:
            end = INT32.size + INT32.unpack_from(rest)[0]
            if len(rest) < end:
                break
            answer = bytes(memoryview(rest)[INT32.size : end])
            del rest[:end]
            self._on_answer(answer)

    def eof_received(self) -> None:
        """Handle the broker's end; the transport closes itself."""
        self._on_end(EOFError("the broker has closed the connection"))

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the end of the connection."""
        self._on_end(error or EOFError("the connection is closed"))


class Connection(conn.AIOKafkaConnection):  # type: ignore[misc]
    """See the module."""

    def _create_reader_task(self) -> asyncio.Future[None]:
        """Read answers; return what ends with the connection, as aiokafka's task does."""
        ended: asyncio.Future[None] = self._loop.create_future()
        reader, closed = self._reader, self._closed_fut

        def end(error: BaseException) -> None:
            reader.feed_eof()  # the connection counts as connected until then
            if not ended.done():
                ended.set_exception(error)
            if not closed.done():
                closed.set_result(None)

        ended.add_done_callback(functools.partial(self._on_read_task_error, weakref.ref(self)))
        self._writer.transport.set_protocol(_Answers(self._handle_frame, end))
        return ended

    def _handle_frame(self, answer: bytes) -> None:
        """Pass an answer to the request that has waited longest."""
        number, packed, waiting = self._requests[0]
        if not isinstance(packed, Packed) or INT32.unpack_from(answer)[0] != number:
            super()._handle_frame(answer)
            return
        if not waiting.done():
            waiting.set_result(packed.RESPONSE_TYPE.decode(memoryview(answer)[INT32.size :]))
        self._last_action = monotonic()
        self._requests.popleft()

    def send(self, request: Any, expect_response: bool = True) -> Any:
        """Send a request; return an awaitable of its answer."""
        packed = request.pack(self._versions) if isinstance(request, Packable) else None
        if packed is None or self._writer is None or not expect_response:
            return super().send(request, expect_response)
        number = self._next_correlation_id()
        name = self._client_id.encode()
        size = _HEADER.size - INT32.size + len(name) + len(packed.body)
        header = _HEADER.pack(size, packed.key, packed.version, number, len(name))
        try:
            self._writer.write(header + name + packed.body)
        except OSError as error:
            self.close(reason=conn.CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(
                f"Connection at {self._host}:{self._port} broken: {error}"
            ) from error
        answer = self._loop.create_future()
        self._requests.append((number, packed, answer))
        return _within(answer, self._request_timeout)


async def _within(answer: asyncio.Future[Any], seconds: float) -> Any:
    """Wait for an answer.

    Raises:
        TimeoutError: it did not come in time.
    """

    def expire() -> None:
        if not answer.done():
            answer.set_exception(TimeoutError())

    timer = answer.get_loop().call_later(seconds, expire)
    try:
        return await answer
    finally:
        timer.cancel()


conn.AIOKafkaConnection = Connection
