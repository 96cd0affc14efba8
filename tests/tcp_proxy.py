"""A proxy in front of a TCP server, in the test's event loop: it counts connections, delays, stops, cuts, garbles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class TcpProxy:
    """What it is to do, and what it saw.

    ``delay_s`` is added to each piece of a reply, ``away_s`` to each request: that is how far away the server is.
    """

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.opened = 0
        """How many connections were made so far."""
        self.most = 0
        """How many there were at one time."""
        self.requests = 0
        """How many requests were sent so far."""
        self.away_s = 0.0
        self.delay_s = 0.0
        self.garbage: bytes | None = None
        """What is sent in place of the next piece of a reply."""
        self.flows = asyncio.Event()
        """Clear: replies stop where they are."""
        self.flows.set()

    async def serve(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            far, to_far = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            to_near.transport.abort()
            return
        ours = {to_near, to_far}
        self._writers |= ours
        self.most = max(self.most, len(self._writers) // 2)
        tasks = {asyncio.create_task(self._copy(near, to_far)), asyncio.create_task(self._answer(far, to_near))}
        self._tasks |= tasks
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._tasks -= tasks
        self._writers -= ours
        for writer in ours:
            writer.close()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                self.requests += 1
                if self.away_s:
                    await asyncio.sleep(self.away_s)
                sink.write(data)

    async def _answer(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self.flows.wait()
                garbage, self.garbage = self.garbage, None
                sink.write(data if garbage is None else garbage)


@contextlib.asynccontextmanager
async def tcp_proxy(upstream: int) -> AsyncIterator[TcpProxy]:
    """Run a proxy to a port of this machine."""
    proxy = TcpProxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.flows.set()
        proxy.cut()
        while proxy._tasks:
            await asyncio.wait(proxy._tasks)
            await asyncio.sleep(0)
