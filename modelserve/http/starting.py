"""Starting a server that its host has not started: the lifespan of a mounted app does not run everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from concurrent.futures import Future
from contextvars import Context
from typing import Final
from weakref import WeakValueDictionary

from modelserve.errors import NotRunning
from modelserve.server import AsyncModelServer
from modelserve.serving.loops import PrivateLoop, elsewhere

_log = logging.getLogger("modelserve")
_BY_REQUEST: Final = (
    "starting late: the server was not started before its first request, which now waits for the models; enter the "
    "server (async with server) in the lifespan of the host application, and have the web server run that lifespan "
    "(uvicorn --lifespan on)"
)
_ALONE: Final = "starting again: the event loop that the server was started in has ended; it goes on in one of its own"


class Starter:
    """Starts a server at the first request that finds it unstarted, in the loop of that request.

    When that loop ends (a test client may make one for each request) the server is closed with it. The next request
    starts it in a private loop, where it stays until it is closed or the interpreter exits.
    """

    def __init__(self, server: AsyncModelServer) -> None:
        self._server = server
        self._private = PrivateLoop(server.close)
        self._choosing = threading.Lock()
        self._home: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.Task[None] | None = None
        self._ended: asyncio.AbstractEventLoop | None = None
        self._has_left: Future[None] = Future()

    @classmethod
    def of(cls, server: AsyncModelServer) -> Starter:
        """Return the one of a server: its mounts have to know of one another's starts."""
        return _starters.setdefault(server, cls(server))

    async def __call__(self) -> asyncio.AbstractEventLoop:
        """Return the loop of the server, once it is started there. A loop that ends meanwhile is left for the next.

        Raises ``NotRunning`` for a server that was closed, and what a start raises.
        """
        while True:
            if self._ended is not None:
                await asyncio.shield(asyncio.wrap_future(self._has_left))
            home = self._choose()
            if home is asyncio.get_running_loop():
                await self._start()
                return home
            with contextlib.suppress(NotRunning):
                await elsewhere(home, self._start())
                return home

    async def _start(self) -> None:
        if asyncio.get_running_loop() is self._ended:
            raise NotRunning("closing")
        # Nothing of the first request (its trace, its user) is to follow the server for life.
        await asyncio.create_task(self._server.start(), context=Context())
        self._home = asyncio.get_running_loop()  # now: until it is started there, it still moves

    def _choose(self) -> asyncio.AbstractEventLoop:
        """Return the loop that the server is started in, or is to be."""
        with self._choosing:
            state, home = self._server.state, self._server.home
            moves = self._ended is not None and self._home is self._ended
            if state in {"closing", "closed"} and not moves:
                raise NotRunning("closing" if state == "closing" else "closed")
            home = home or self._home
            if home is None:
                _log.warning(_BY_REQUEST)
                home = self._home = asyncio.get_running_loop()
                self._watching = asyncio.create_task(self._leave_with_loop(), context=Context())
            elif moves or not home.is_running():
                if not self._private.is_open:
                    _log.warning(_ALONE)
                home = self._private.open()
            return home

    async def _leave_with_loop(self) -> None:
        """Close the server when the loop ends, which cancels what is still there."""
        here = asyncio.get_running_loop()
        try:
            await here.create_future()
        finally:
            if self._server.home is here:
                self._ended = here
                try:
                    await self._server.close()
                finally:
                    self._has_left.set_result(None)


_starters: Final[WeakValueDictionary[AsyncModelServer, Starter]] = WeakValueDictionary()
