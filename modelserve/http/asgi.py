"""The ASGI face: a complete app by itself, a mount inside a host, or a door in front of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from modelserve.errors import NotRunning
from modelserve.http.api import Api
from modelserve.http.endpoints import Families
from modelserve.http.messages import HEADERS, LISTS, Request, Response, content_length, request_id_in
from modelserve.http.problems import HttpProblem, problem_response
from modelserve.http.starting import Starter
from modelserve.server import AsyncModelServer
from modelserve.serving.loops import elsewhere
from modelserve.signature import MAX_BODY_BYTES

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_ALIVE: Final = "/health/live"  # a process that loads its models is alive
_HEADERS: Final = {name.encode(): name for name in HEADERS}


class _Disconnected(Exception):  # not an error: the client has left
    """The client left before it had sent its request."""


class AsgiFace:
    """Answers HTTP with a server's predictions.

    With ``otherwise`` it stands in front of that app and takes only what lies under ``prefix``; everything else,
    the lifespan included, is the host's. Without, or if the host has no lifespan, it starts and stops the server
    through the lifespan protocol. A server that has not been started by then is started by the first request.
    """

    def __init__(
        self,
        server: AsyncModelServer,
        *,
        prefix: str = "",
        otherwise: App | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        routes: Families = None,
    ) -> None:
        if not isinstance(server, AsyncModelServer):
            msg = f"ms.asgi takes an AsyncModelServer, not a {type(server).__name__}; ms.wsgi takes a ModelServer"
            raise TypeError(msg)
        self._server = server
        self._api = Api(server, routes)
        self._started = Starter.of(server)
        self._prefix = f"/{prefix.strip('/')}" if prefix.strip("/") else ""
        self._otherwise = otherwise
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            path, root = self._locate(scope)
            if path is not None:
                await self._answer(scope, path, root, receive, send)
                return
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif self._otherwise is not None:
            await self._otherwise(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await _send(send, problem_response(HttpProblem(404, "not-found", "there is nothing here")))

    def _locate(self, scope: Scope) -> tuple[str | None, str]:
        """Return the path below this mount (None: not ours), and where the mount is."""
        path, root = scope["path"], scope.get("root_path", "")
        if root:
            path = _below_root(path, root, scope.get("app_root_path", ""))
        if not self._prefix:
            return path, root
        below = _below(self._prefix, path)
        return below, root if below is None else root + self._prefix

    async def _answer(self, scope: Scope, path: str, root: str, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        request_id = request_id_in(headers)
        head = scope["method"] == "HEAD"
        method = "GET" if head else scope["method"]
        try:
            body = await self._body(receive, content_length(headers) or 0)
            own_id = request_id or self._server.new_request_id()
            request = Request(method, path, body, headers, own_id, root, scope.get("query_string", b""))
            if self._server.runs_here or path.removesuffix("/") == _ALIVE:
                response = await self._api(request)
            else:
                response = await self._hand_over(request)
        except _Disconnected:
            return
        except Exception as error:  # noqa: BLE001  # a body that is refused, or a start that failed
            response = problem_response(error, request_id)
        await _send(send, response, head=head)

    async def _hand_over(self, request: Request) -> Response:
        """Answer in the loop of the server, which is started first. If that loop ends meanwhile, ask in the next.

        Raises as :class:`Starter` does.
        """
        while True:
            home = await self._started()
            if home is asyncio.get_running_loop():
                return await self._api(request)
            with contextlib.suppress(NotRunning):
                return await elsewhere(home, self._answer_at_home(request))

    async def _answer_at_home(self, request: Request) -> Response:
        response = await self._api(request)
        if response.status == 503 and not self._server.runs_here:  # noqa: PLR2004  # the loop is ending
            raise NotRunning("closing")
        return response

    async def _body(self, receive: Receive, length: int) -> bytes:
        if length > self._max_body_bytes:
            raise self._too_large()
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Disconnected
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            body = await self._rest(body, receive)
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        return body

    async def _rest(self, body: bytes, receive: Receive) -> bytes:
        chunks = bytearray(body)
        more = True
        while more:
            if len(chunks) > self._max_body_bytes:
                raise self._too_large()
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunks += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(chunks)

    def _too_large(self) -> HttpProblem:
        detail = f"the body is larger than {self._max_body_bytes} bytes"
        return HttpProblem(413, "content-too-large", detail, connection="close")

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._otherwise is None or not await _takes_lifespan(self._otherwise, scope, receive, send):
            await self._own_lifespan(receive, send)

    async def _own_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._server.start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._server.close()
        await send({"type": "lifespan.shutdown.complete"})


async def _takes_lifespan(host: App, scope: Scope, receive: Receive, send: Send) -> bool:
    """Run the host's lifespan; say whether it has one. One that has none (Django) raises or returns at once."""
    taken = False

    async def taking() -> MutableMapping[str, Any]:
        nonlocal taken
        taken = True
        return await receive()

    try:
        await host(scope, taking, send)
    except Exception:
        if taken:
            raise
    return taken


def _below(prefix: str, path: str) -> str | None:
    """Return the rest of a path that lies under a prefix, None for one that does not: /mlops is not under /ml."""
    if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in {"/", ""}:
        return path[len(prefix) :]
    return None


def _below_root(path: str, root: str, app_root: str) -> str:
    """Cut off where this app is mounted.

    A server or an outer mount leaves the root in front of the path (ASGI 3) or has cut it off. Behind a proxy that
    cuts the app's own root off, only the part that Starlette's mounts added (beyond ``app_root_path``) is in front.
    """
    below = _below(root, path)
    if below is None and app_root and root.startswith(app_root):
        below = _below(root[len(app_root) :], path)
    return path if below is None else below


def _headers(scope: Scope) -> dict[str, str]:
    """Return the headers that a request carries. ASGI has their names in lower case."""
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = _HEADERS.get(raw)
        if name is not None:
            text = value.decode("latin-1")
            found[name] = f"{found[name]}, {text}" if name in found and name in LISTS else text
    return found


async def _send(send: Send, response: Response, *, head: bool = False) -> None:
    headers = [
        (b"content-type", response.content_type.encode()),
        (b"content-length", b"%d" % len(response.body)),
    ]
    headers += [(name.encode(), value.encode("latin-1")) for name, value in response.headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else response.body})


def asgi(
    server: AsyncModelServer,
    *,
    prefix: str = "",
    otherwise: App | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    routes: Families = None,
) -> AsgiFace:
    """Return a server's ASGI app.

    ``app.mount("/ml", ms.asgi(server))`` mounts it (the host's lifespan starts the server, or else the first request);
    ``ms.asgi(server, prefix="/ml", otherwise=app)`` answers its prefix before the host's middleware costs anything;
    ``uvicorn module:app`` with ``app = ms.asgi(server)`` serves it alone. Bodies over ``max_body_bytes`` get a 413.
    ``routes="predict"``, or several of ``predict``, ``models``, ``health``, ``openapi`` and ``metrics``, answers these
    alone; raises ``ConfigError`` for any other.
    """
    return AsgiFace(server, prefix=prefix, otherwise=otherwise, max_body_bytes=max_body_bytes, routes=routes)
