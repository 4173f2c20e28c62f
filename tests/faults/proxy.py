"""A TCP proxy that delays what it passes, holds it back, or sends new clients elsewhere."""

from __future__ import annotations

import asyncio
from types import TracebackType

from pipeline.local.ports import HOST, free_port

CHUNK_BYTES = 65_536
CHUNKS_MAX = 256
"""Of one direction that are on their way; then its sender has to wait."""


class Proxy:
    """Stands between clients and a server of this machine; an async context manager.

    Args:
        target_port: of the server.

    Attributes:
        port: for the clients.
        delay_seconds: each byte takes so long, in each direction.
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
        await self._cut()

    def hold(self) -> None:
        """Pass nothing on; connections stay open."""
        self._flows.clear()

    def release(self) -> None:
        """Go on after :meth:`hold`."""
        self._flows.set()

    async def lead_to(self, target_port: int) -> None:
        """Cut all connections; new ones go to another server."""
        self._target_port = target_port
        await self._cut()

    async def _cut(self) -> None:
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
            # Cut, by us. A handler that ends as cancelled is logged as an error.
            return
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            return  # the server is away, and the client sees its connection closed
        ways = [
            asyncio.ensure_future(self._carry(reader, back)),
            asyncio.ensure_future(self._carry(there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            back.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction of one connection, until either side closes it."""
        clock = asyncio.get_running_loop().time
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_MAX)

        async def take() -> None:
            chunk = b" "
            while chunk:
                try:
                    chunk = await reader.read(CHUNK_BYTES)
                except OSError:
                    chunk = b""
                await on_the_way.put((clock() + self.delay_seconds, chunk))

        taking = asyncio.ensure_future(take())
        try:
            while True:
                due, chunk = await on_the_way.get()
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
