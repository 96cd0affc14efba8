"""The ASGI face: alone, inside a host, and in front of one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

import modelserve as ms
from tests.http.driver import (
    JSON,
    Answer,
    App,
    Caller,
    Message,
    Messages,
    Subject,
    asgi_caller,
    predict,
    scope_of,
    socket_caller,
    uvicorn_serving,
)

GOOD = b'{"inputs": {"x": [0.5, -1.5, 2, 0.25]}}'


@pytest.fixture
def unstarted(registry: ms.Registry, options: dict[str, ms.ModelOptions], tmp_path: Path) -> ms.AsyncModelServer:
    """A server for whoever starts and stops it."""
    return ms.AsyncModelServer(registry, options, cache_dir=tmp_path / "cache", poll_s=3600)


async def hello(_: Request) -> PlainTextResponse:
    return PlainTextResponse("the host")


def under(prefix: str, call: Caller) -> Caller:
    """Call what lies under a prefix."""
    return lambda method, path, body=b"", headers=(JSON,): call(method, prefix + path, body, headers)


def run(server: ms.ModelServer, app: App, scope: dict[str, Any], messages: Messages) -> None:
    """Run one connection of an app in the server's loop."""

    async def connect() -> None:
        await app(scope, messages.receive, messages.send)

    server.call(connect())


def at(server: ms.ModelServer, app: App, path: str, **scope: Any) -> Answer:
    """GET a path with a scope of one's own."""
    messages = Messages([b""])
    run(server, app, scope_of("GET", path, **scope), messages)
    return messages.answer()


class Lifespan(Messages):
    """What a web server says to an app that it starts and stops."""

    def __init__(self) -> None:
        super().__init__([])
        self._said = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive(self) -> Message:
        return {"type": next(self._said)}

    @property
    def heard(self) -> list[str]:
        return [message["type"] for message in self.sent]


# -- by itself ---------------------------------------------------------------------------------------------


def test_by_itself_it_starts_and_stops_its_server(unstarted: ms.AsyncModelServer, subjects: dict[str, Subject]) -> None:
    """Under uvicorn alone the app is complete: ready when uvicorn is up, closed when it is down."""
    with uvicorn_serving(ms.asgi(unstarted)) as address:
        assert unstarted.ready
        for subject in subjects.values():
            subject.check_serves(socket_caller(address))
        head = socket_caller(address)("HEAD", "/models/c++_1.0-b")
        assert head.status == 200
    assert not unstarted.ready


async def test_the_lifespan_is_answered_step_by_step(unstarted: ms.AsyncModelServer) -> None:
    """Startup is complete when the models are loaded, shutdown when they are freed."""
    lifespan, ready = Lifespan(), []

    async def send(message: Message) -> None:
        ready.append(unstarted.ready)
        await lifespan.send(message)

    await ms.asgi(unstarted)({"type": "lifespan"}, lifespan.receive, send)
    assert lifespan.heard == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert ready == [True, False]


async def test_a_start_that_fails_is_told(registry: ms.Registry, tmp_path: Path) -> None:
    """The web server learns that the app cannot start, and why."""
    (tmp_path / "cache").write_text("a file where a folder should be")
    lifespan = Lifespan()
    with pytest.raises(Exception, match="cache"):
        await ms.asgi(ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache"))(
            {"type": "lifespan"}, lifespan.receive, lifespan.send
        )
    assert lifespan.heard == ["lifespan.startup.failed"]
    assert "cache" in lifespan.sent[0]["message"]


def test_by_itself_it_closes_websockets(server: ms.ModelServer) -> None:
    """There is nothing to talk about; the handshake is refused, not crashed into."""
    messages = Messages([])
    run(server, ms.asgi(server.core), {"type": "websocket", "path": "/models"}, messages)
    assert [message["type"] for message in messages.sent] == ["websocket.close"]


def test_it_takes_an_async_server_only(server: ms.ModelServer) -> None:
    """The other server is refused with the name of its own face."""
    with pytest.raises(TypeError, match=r"ms\.wsgi takes a ModelServer"):
        ms.asgi(server)  # type: ignore[arg-type]


# -- inside a host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [Starlette, FastAPI])
def test_mounted_in_a_host(server: ms.ModelServer, subjects: dict[str, Subject], host: Callable[[], Any]) -> None:
    """Under a mount every route works, and what lies outside is the host's."""
    app = host()
    app.mount("/ml", ms.asgi(server.core))
    app.add_route("/", hello)
    call = asgi_caller(server, app)
    for subject in subjects.values():
        subject.check_serves(under("/ml", call))
    assert call("GET", "/ml/openapi.json").json()["servers"] == [{"url": "/ml"}]
    assert call("GET", "/").body == b"the host"
    assert call("GET", "/models").status == 404
    assert call("GET", "/ml/nothing").problem()["status"] == 404
    assert call("GET", "/ml/predict/trees").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("make", "reach", "root"),
    [
        (lambda app: Starlette(routes=[Mount("/a", Starlette(routes=[Mount("/b", app)]))]), "/a/b", "/a/b"),
        (lambda app: Starlette(routes=[Mount("/{tenant}/ml", app)]), "/acme/ml", "/acme/ml"),
        (lambda app: Starlette(routes=[Mount("/", app)]), "", ""),
        (lambda app: Starlette(routes=[Mount("/predict", app)]), "/predict", "/predict"),
    ],
    ids=["nested", "parameter", "root", "named like a route"],
)
def test_mounted_anywhere(
    server: ms.ModelServer, subjects: dict[str, Subject], make: Callable[[App], App], reach: str, root: str
) -> None:
    """Nested mounts, mounts with parameters, mounts at the root: routes are relative to wherever it is."""
    call = under(reach, asgi_caller(server, make(ms.asgi(server.core))))
    subjects["trees"].check_serves(call)
    assert call("GET", "/openapi.json").json()["servers"] == [{"url": root or "/"}]


@pytest.mark.parametrize(
    ("scope", "root"),
    [
        ({"path": "/models"}, "/"),
        ({"path": "/api/models", "root_path": "/api"}, "/api"),
        ({"path": "/models", "root_path": "/api"}, "/api"),
        ({"path": "/models", "root_path": "/m"}, "/m"),
        ({"path": "/models", "root_path": "/models/v1"}, "/models/v1"),
        ({"path": "/api/ml/models", "root_path": "/api/ml", "app_root_path": "/api"}, "/api/ml"),
        ({"path": "/ml/models", "root_path": "/api/ml", "app_root_path": "/api"}, "/api/ml"),
    ],
)
def test_the_root_may_be_in_the_path_or_cut_off(server: ms.ModelServer, scope: dict[str, Any], root: str) -> None:
    """Servers and proxies differ in what they leave of the root; the route is found, and the root is told."""
    app = ms.asgi(server.core)
    assert len(at(server, app, **scope).json()["models"]) == 4
    described = scope | {"path": scope["path"].replace("models", "openapi.json")}
    if "models" not in root:
        assert at(server, app, **described).json()["servers"] == [{"url": root}]


@pytest.mark.parametrize("sent", ["/ml", "/api/ml"])
@pytest.mark.parametrize("host", [Starlette, FastAPI])
def test_mounted_in_a_host_behind_a_proxy(server: ms.ModelServer, sent: str, host: Callable[[], Any]) -> None:
    """A host with a root path of its own works whether or not the proxy has cut it off."""
    app = host()
    app.mount("/ml", ms.asgi(server.core))
    assert len(at(server, app, f"{sent}/models", root_path="/api").json()["models"]) == 4
    assert at(server, app, f"{sent}/openapi.json", root_path="/api").json()["servers"] == [{"url": "/api/ml"}]


def test_behind_uvicorns_root_path(unstarted: ms.AsyncModelServer, subjects: dict[str, Subject]) -> None:
    """Uvicorn puts its root in front of every path."""
    with uvicorn_serving(ms.asgi(unstarted), root_path="/api") as address:
        subjects["trees"].check_serves(socket_caller(address))
        assert socket_caller(address)("GET", "/openapi.json").json()["servers"] == [{"url": "/api"}]


async def test_mounted_the_hosts_lifespan_starts_the_server(unstarted: ms.AsyncModelServer) -> None:
    """A host that enters the server in its lifespan serves from its startup to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with unstarted:
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/ml", ms.asgi(unstarted))
    messages, ready = Lifespan(), []

    async def send(message: Message) -> None:
        ready.append(unstarted.ready)
        await messages.send(message)

    await app({"type": "lifespan", "app": app, "state": {}}, messages.receive, send)
    assert ready == [True, False]


# -- in front of a host ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/ml", "/ml/", "ml"])
def test_in_front_of_a_host_it_takes_its_prefix_only(
    server: ms.ModelServer, subjects: dict[str, Subject], prefix: str
) -> None:
    """What lies under the prefix is answered; the rest, and what only looks like it, is the host's."""
    host = Starlette(routes=[Route("/{path:path}", hello)])
    call = asgi_caller(server, ms.asgi(server.core, prefix=prefix, otherwise=host))
    for subject in subjects.values():
        subject.check_serves(under("/ml", call))
    assert call("GET", "/ml/openapi.json").json()["servers"] == [{"url": "/ml"}]
    for ours in ("/ml", "/ml/", "/ml/ml/models"):
        assert call("GET", ours).problem()["status"] == 404
    for theirs in ("/", "/models", "/mlops", "/mlops/models", "/ML/models", "/a/ml/models"):
        assert call("GET", theirs).body == b"the host"


def test_in_front_of_a_host_under_a_root(server: ms.ModelServer) -> None:
    """The prefix is looked for below the root, and told with it."""
    app = ms.asgi(server.core, prefix="/ml", otherwise=Starlette(routes=[Route("/{path:path}", hello)]))
    for path in ("/api/ml/openapi.json", "/ml/openapi.json"):
        assert at(server, app, path, root_path="/api").json()["servers"] == [{"url": "/api/ml"}]
    assert at(server, app, "/api/mlops", root_path="/api").body == b"the host"


async def test_in_front_of_a_host_the_lifespan_is_the_hosts(unstarted: ms.AsyncModelServer) -> None:
    """Startup and shutdown go to the host, which starts the server or not."""
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        seen.append("up")
        yield
        seen.append("down")

    messages = Lifespan()
    app = ms.asgi(unstarted, prefix="/ml", otherwise=Starlette(lifespan=lifespan))
    await app({"type": "lifespan", "state": {}}, messages.receive, messages.send)
    assert seen == ["up", "down"]
    assert messages.heard == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert unstarted.status() == []


def test_in_front_of_a_host_websockets_are_the_hosts(server: ms.ModelServer) -> None:
    """Even under the prefix: this face speaks HTTP only."""
    seen: list[str] = []

    async def talk(websocket: WebSocket) -> None:
        seen.append(websocket.url.path)
        await websocket.close()

    app = ms.asgi(server.core, prefix="/ml", otherwise=Starlette(routes=[WebSocketRoute("/{path:path}", talk)]))
    scope = scope_of("GET", "/ml/talk") | {"type": "websocket", "scheme": "ws", "subprotocols": []}
    run(server, app, scope, Messages([b""]))
    assert seen == ["/ml/talk"]


def test_a_prefix_without_a_host(server: ms.ModelServer, subjects: dict[str, Subject]) -> None:
    """Without a host behind it, the rest is a 404 of its own."""
    call = asgi_caller(server, ms.asgi(server.core, prefix="/ml"))
    subjects["trees"].check_serves(under("/ml", call))
    assert call("GET", "/models").problem()["status"] == 404


# -- bodies ------------------------------------------------------------------------------------------------


def post(server: ms.ModelServer, messages: Messages, *headers: tuple[str, str], limit: int = 1000) -> None:
    """Post a body of messages to a model."""
    run(
        server,
        ms.asgi(server.core, max_body_bytes=limit),
        scope_of("POST", "/predict/trees", (JSON, *headers)),
        messages,
    )


@pytest.mark.parametrize("size", [1, 2, 7, 38, 39, 1000])
def test_a_body_in_pieces(server: ms.ModelServer, subjects: dict[str, Subject], size: int) -> None:
    """However a body is cut, empty pieces included, it is put together again."""
    pieces = [GOOD[i : i + size] for i in range(0, len(GOOD), size)]
    messages = Messages([b"", *pieces, b""])
    post(server, messages)
    assert subjects["trees"].agrees({"x": [0.5, -1.5, 2, 0.25]}, messages.answer().json()["prediction"])


def test_a_message_without_a_body(server: ms.ModelServer) -> None:
    """ASGI lets a server leave out what is empty."""
    messages = Messages([])

    async def receive() -> Message:
        return {"type": "http.request"}

    messages.receive = receive  # type: ignore[method-assign]
    post(server, messages)
    assert messages.answer().status == 400


@pytest.mark.parametrize("length", ["1001", "2147483648", "9" * 30, "9" * 5000])
def test_a_body_declared_too_large_is_not_read(server: ms.ModelServer, length: str) -> None:
    """The refusal comes before the first byte is asked for, and closes the connection."""
    messages = Messages([GOOD])
    post(server, messages, ("content-length", length))
    answer = messages.answer()
    assert (answer.status, answer.headers["connection"], messages.received) == (413, "close", 0)
    answer.problem()


@pytest.mark.parametrize("length", ["0", "-1", "abc", "", "1e9", "0" * 5000 + "1"])
def test_a_length_that_says_nothing_is_not_believed(server: ms.ModelServer, length: str) -> None:
    """What counts is the body that comes."""
    messages = Messages([GOOD])
    post(server, messages, ("content-length", length))
    assert messages.answer().status == 200


def test_a_body_without_end_is_read_up_to_the_limit(server: ms.ModelServer) -> None:
    """No more than the limit and one piece is ever taken in."""
    messages = Messages([b" " * 100] * 10_000)
    post(server, messages)
    answer = messages.answer()
    assert (answer.status, messages.received) == (413, 11)
    answer.problem()


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_limit_is_exact(server: ms.ModelServer, size: int, status: int, pieces: int) -> None:
    """A body of just the limit passes, one byte more does not, in one piece or in two."""
    body = GOOD + b" " * (size - len(GOOD))
    messages = Messages([body] if pieces == 1 else [body[:500], body[500:]])
    post(server, messages)
    assert messages.answer().status == status


@pytest.mark.parametrize("pieces", [[], [b""], [GOOD], [GOOD, b" "]])
def test_a_client_that_leaves_gets_no_answer(
    server: ms.ModelServer, subjects: dict[str, Subject], pieces: list[bytes]
) -> None:
    """Before the body is complete there is nothing to answer, and nobody to answer it to."""
    messages = Messages(pieces, disconnect=True)
    post(server, messages)
    assert messages.sent == []
    subjects["trees"].check_serves(asgi_caller(server, ms.asgi(server.core)))


def test_the_default_limit_is_sixteen_mebibytes(server: ms.ModelServer) -> None:
    """Large enough for an image, small enough for memory."""
    for length, status in ((16 * 1024**2, 400), (16 * 1024**2 + 1, 413)):
        messages = Messages([b""])
        run(
            server,
            ms.asgi(server.core),
            scope_of("POST", "/predict/trees", [("content-length", str(length))]),
            messages,
        )
        assert messages.answer().status == status


def test_of_several_headers_the_last_counts(server: ms.ModelServer) -> None:
    """Repeated headers do not confuse anything."""
    call = asgi_caller(server, ms.asgi(server.core))
    headers = [("content-type", "text/plain"), JSON, ("x-request-id", "a"), ("x-request-id", "b")]
    assert call("POST", "/predict/trees", GOOD, headers).json()["request_id"] == "b"
    assert predict(call, "trees", {"x": [1, 2, 3, 4]}).status == 200
