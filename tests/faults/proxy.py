"""A TCP proxy that delays data, holds it back, or redirects clients."""

from __future__ import annotations

import asyncio
from types import TracebackType

from pipeline.local.ports import HOST, free_port

CHUNK_BYTES = 65_536
CHUNKS_MAX = 256
"""Limit of the chunks in flight in one direction; then the sender waits."""


class Proxy:
    """A proxy between clients and a server of this machine; an async context manager.

    Args:
        target_port: port of the server.

    Attributes:
        port: port for the clients.
        delay_seconds: delay of each byte in each direction.
    """

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.delay_seconds = 0.0
        self._target_port = target_port
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, HOST, self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self._disconnect()

    def hold(self) -> None:
        """Hold all data back; connections stay open."""
        self._flows.clear()

    def release(self) -> None:
        """Continue after :meth:`hold`."""
        self._flows.set()

    async def redirect(self, target_port: int) -> None:
        """Close all connections and send new ones to another server."""
        self._target_port = target_port
        await self._disconnect()

    async def _disconnect(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            # Cancelled by _disconnect. asyncio would log a cancelled handler as an error.
            return
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            return  # the server is unreachable, and the client sees a closed connection
        directions = [
            asyncio.ensure_future(self._carry(reader, back)),
            asyncio.ensure_future(self._carry(there, writer)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            back.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction of a connection until a side closes it."""
        clock = asyncio.get_running_loop().time
        in_flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_MAX)

        async def take() -> None:
            chunk = b" "
            while chunk:
                try:
                    chunk = await reader.read(CHUNK_BYTES)
                except OSError:
                    chunk = b""
                await in_flight.put((clock() + self.delay_seconds, chunk))

        taking = asyncio.ensure_future(take())
        try:
            while True:
                due, chunk = await in_flight.get()
                await asyncio.sleep(max(0.0, due - clock()))
                await self._flows.wait()
                if not chunk:
                    return
                writer.write(chunk)
                await writer.drain()
        except OSError:
            return  # the other side closed it
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
