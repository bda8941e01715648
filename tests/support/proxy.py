"""A TCP proxy on loopback that can stand still, or cut connections in the middle of a message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

CHUNK_BYTES = 16 * 1024


class Proxy:
    """Passes bytes both ways until it is told otherwise."""

    def __init__(self, host: str, port: int) -> None:
        """Will connect to that place."""
        self._target = (host, port)
        self._open = asyncio.Event()
        self._open.set()
        self._left: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def stall(self) -> None:
        """Passes nothing on any more, and keeps the connections."""
        self._open.clear()

    def go_on(self) -> None:
        """Passes on again."""
        self._open.set()

    def cut_after(self, upstream_bytes: int) -> None:
        """Passes that many more bytes to the server, then cuts every connection."""
        self._left = upstream_bytes

    def cut(self) -> None:
        """Cuts every connection, without a farewell."""
        for writer in self._writers:
            writer.transport.abort()

    async def start(self) -> None:
        """Listens at a port of its own."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        """Cuts everything and listens no more."""
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, to_writer}
        for source, sink, up in ((reader, to_writer, True), (to_reader, writer, False)):
            task = asyncio.create_task(self._pump(source, sink, upstream=up))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, upstream: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                await self._open.wait()
                if upstream and self._left is not None:
                    data = data[: self._left]
                    self._left -= len(data)
                sink.write(data)
                await sink.drain()
                if self._left == 0:
                    self.cut()
        sink.close()
        self._writers.discard(sink)


@asynccontextmanager
async def proxy(address: str) -> AsyncIterator[Proxy]:
    """A proxy to that address for the block."""
    host, _, port = address.rpartition(":")
    one = Proxy(host, int(port))
    await one.start()
    try:
        yield one
    finally:
        await one.stop()
