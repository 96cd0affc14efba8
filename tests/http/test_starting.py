"""The ASGI face over a server that nothing has started: hosts without a lifespan, and loops that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import litestar
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

import modelserve as ms
from modelserve.errors import NotRunning
from modelserve.serving.inference import Inference, PredictRequest
from modelserve.serving.loops import PrivateLoop
from modelserve.testing.models import tells, telltale
from tests.http.driver import Answer, App, Message, Messages, call_asgi, socket_caller, uvicorn_serving
from tests.test_sync_server import run_script

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have httpx2
    from starlette.testclient import TestClient

BODY = b'{"inputs": {"x": [1.0]}}'
LATE, AGAIN, LOST = "starting late", "starting again", "lost"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ms.Registry]:
    """A registry with the model ``m`` in production."""
    with ms.Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/models.db") as registry:
        registry.register("m", "1", telltale(1), example=np.array([[1.0], [2.0]]))
        registry.promote("m", "1")
        yield registry


@pytest.fixture
def server(registry: ms.Registry, tmp_path: Path) -> Iterator[ms.AsyncModelServer]:
    """A server that nothing has started."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", poll_s=3600, log=False)
    yield server
    asyncio.run(server.close())


@pytest.fixture(autouse=True)
def no_loop_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the private loops that were opened, as the interpreter does when it exits."""
    opened: list[PrivateLoop] = []
    begin = PrivateLoop.open

    def opening(private: PrivateLoop) -> asyncio.AbstractEventLoop:
        opened.append(private)
        return begin(private)

    monkeypatch.setattr(PrivateLoop, "open", opening)
    yield
    for private in opened:
        private.close()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return how each warning that was logged begins."""

    def told() -> list[str]:
        return [each.getMessage().partition(":")[0] for each in caplog.records if each.levelno >= logging.WARNING]

    return told


async def ask(app: App) -> Answer:
    return await call_asgi(app, "POST", "/ml/predict/m", BODY)


def answers(client: TestClient) -> bool:
    response = client.post("/ml/predict/m", content=BODY, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    return tells(response.json()["prediction"], 1.0) == 1


def mounted(server: ms.AsyncModelServer) -> App:
    """Return FastAPI with a mount and a route of its own, and without a lifespan."""
    app = FastAPI()
    app.mount("/ml", ms.asgi(server))

    @app.get("/own")
    async def own() -> Any:
        return (await server.predict("m", {"x": [1.0]})).prediction

    return app


def in_litestar(server: ms.AsyncModelServer) -> App:
    return litestar.Litestar(
        route_handlers=[litestar.asgi("/ml", is_mount=True, copy_scope=True)(ms.asgi(server))],
        openapi_config=None,
        logging_config=None,
    )


async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
    """Take nothing but HTTP, as Django does."""
    if scope["type"] != "http":
        raise ValueError("only HTTP connections are handled")


HOSTS: dict[str, Callable[[ms.AsyncModelServer], App]] = {
    "FastAPI": mounted,
    "Starlette": lambda server: Starlette(routes=[Mount("/ml", ms.asgi(server))]),
    "Litestar": in_litestar,
    "in front": lambda server: ms.asgi(server, prefix="/ml", otherwise=FastAPI()),
    "alone": lambda server: ms.asgi(server, prefix="/ml"),
}
host = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)


# -- the first request -------------------------------------------------------------------------------------


@host
async def test_the_first_request_starts_the_server(
    server: ms.AsyncModelServer, make: Callable[[ms.AsyncModelServer], App], told: Callable[[], list[str]]
) -> None:
    """In its own loop, once for all who come meanwhile, with a warning; what comes later finds it started."""
    app = make(server)
    first = await asyncio.gather(*(ask(app) for _ in range(10)))
    assert [answer.status for answer in first] == [200] * 10
    assert server.home is asyncio.get_running_loop()
    assert (await ask(app)).status == 200
    assert told() == [LATE]
    await server.close()


def test_under_uvicorn_whose_lifespan_is_off(server: ms.AsyncModelServer, told: Callable[[], list[str]]) -> None:
    """A real web server that runs no lifespan serves, and the server is closed with its loop."""
    with uvicorn_serving(ms.asgi(server, prefix="/ml"), lifespan="off") as address:
        call = socket_caller(address)
        assert call("GET", "/ml/health/live").json() == call("GET", "/ml/health/live/").json() == {"status": "alive"}
        assert not server.ready  # a probe of liveness neither waits for models nor starts them
        assert call("POST", "/ml/predict/m", BODY).status == 200
        assert call("GET", "/ml/health/ready").status == 200
    assert (server.state, told()) == ("closed", [LATE])


async def test_a_caller_that_leaves_does_not_end_the_start(server: ms.AsyncModelServer) -> None:
    """A first request that is cancelled while the models load leaves the start to those that wait with it."""
    app = mounted(server)
    first, second = asyncio.create_task(ask(app)), asyncio.create_task(ask(app))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).status == 200
    assert first.cancelled()
    await server.close()


async def test_a_start_that_fails_is_a_problem_and_is_tried_again(registry: ms.Registry, tmp_path: Path) -> None:
    """What keeps the server from starting is in the log, and the next request tries again."""
    (tmp_path / "cache").write_text("in the way")
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", log=False)
    app = mounted(server)
    assert (await ask(app)).problem()["type"] == "urn:modelserve:problem:internal-error"
    (tmp_path / "cache").unlink()
    assert (await ask(app)).status == 200
    await server.close()


async def test_the_start_takes_nothing_of_the_request_with_it(server: ms.AsyncModelServer) -> None:
    """What the first request has in its context does not follow the server for life."""
    user = contextvars.ContextVar[str]("user")
    seen: list[str | None] = []
    server.observe(lambda _: seen.append(user.get(None)))
    user.set("the first")
    app = mounted(server)
    await asyncio.create_task(ask(app), context=contextvars.copy_context())
    assert seen[0] is None  # the version was loaded
    await server.close()


# -- loops that come and go --------------------------------------------------------------------------------


@host
def test_a_client_with_a_loop_for_each_request(
    server: ms.AsyncModelServer, make: Callable[[ms.AsyncModelServer], App], told: Callable[[], list[str]]
) -> None:
    """The first request's loop ends with it; the second starts the server in a loop of its own, where it stays."""
    client = TestClient(make(server))
    assert [answers(client) for _ in range(4)] == [True] * 4
    assert told() == [LATE, AGAIN]
    assert client.get("/ml/health/ready").status_code == 200
    assert client.get("/ml/models/m").json()["versions"][0]["version"] == "1"
    assert client.get("/ml/metrics").status_code == 200


def test_a_client_that_runs_the_lifespan(registry: ms.Registry, tmp_path: Path, told: Callable[[], list[str]]) -> None:
    """Where the host's lifespan enters the server, nothing is started late, and nothing is said."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", log=False)
    with TestClient(entering(server)) as client:
        assert answers(client)
    assert (server.state, told()) == ("closed", [])


def entering(server: ms.AsyncModelServer) -> App:
    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with server:
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/ml", ms.asgi(server))
    return app


def test_a_lifespan_after_requests_without_one(server: ms.AsyncModelServer) -> None:
    """A host that enters the server late finds it started, and closes it; closed it stays."""
    app = entering(server)
    client = TestClient(app)
    assert [answers(client) for _ in range(2)] == [True] * 2
    with client:
        assert answers(client)
    refused = client.post("/ml/predict/m", content=BODY)
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:modelserve:problem:not-ready")
    assert "the server was closed" in refused.json()["detail"]
    assert client.get("/ml/health/live").status_code == 200


def test_the_hosts_own_routes_reach_a_server_in_another_loop(server: ms.AsyncModelServer) -> None:
    """Before the start the error says what is missing; afterwards ``await server.predict`` works in any loop."""
    client = TestClient(mounted(server))
    with pytest.raises(NotRunning, match="was not started: enter it"):
        client.get("/own")
    assert [answers(client) for _ in range(2)] == [True] * 2
    assert tells(client.get("/own").json(), 1.0) == 1


async def test_another_threads_loop_is_answered_where_the_server_lives(server: ms.AsyncModelServer) -> None:
    """Requests of other loops go to the loop of the server while that runs; deadlines are kept there."""
    app = mounted(server)
    assert (await ask(app)).status == 200
    assert (await asyncio.to_thread(lambda: asyncio.run(ask(app)))).status == 200
    assert server.home is asyncio.get_running_loop()
    with pytest.raises(ms.DeadlineExceeded):
        await asyncio.to_thread(lambda: asyncio.run(server.predict("m", {"x": [1.0]}, timeout_ms=0)))
    await server.close()


def test_first_requests_of_many_loops_at_once(server: ms.AsyncModelServer) -> None:
    """Threads with loops of their own share one start; each is answered, also when the loop of that start has ended."""
    app = mounted(server)
    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(lambda _: asyncio.run(ask(app)).status, range(24)))
    assert statuses == [200] * 24


def test_a_request_is_asked_again_when_the_loop_it_was_handed_to_ends(
    server: ms.AsyncModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was on its way in another loop when that ended is answered in the next one."""
    app, answer = mounted(server), server.answer
    arrived, ready = threading.Event(), threading.Event()

    async def held(request: PredictRequest) -> Inference:
        if arrived.is_set() or asyncio.get_running_loop() is not server.home:
            return await answer(request)
        arrived.set()
        await asyncio.get_running_loop().create_future()  # until this loop ends
        raise AssertionError

    async def first() -> int:
        status = (await ask(app)).status
        monkeypatch.setattr(server, "answer", held)
        ready.set()
        await asyncio.to_thread(arrived.wait, 20)
        return status

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(lambda: asyncio.run(first()))
        assert ready.wait(20)
        other = threads.submit(lambda: asyncio.run(ask(app)).status)
        assert (one.result(30), other.result(30)) == (200, 200)


def test_a_loop_that_is_closed_without_a_word(server: ms.AsyncModelServer, told: Callable[[], list[str]]) -> None:
    """A host that drops its loop as it is is answered all the same; the log says so, and no replica stays behind."""
    app = mounted(server)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask(app))
    left = asyncio.all_tasks(loop)
    (replica,) = [each for each in threading.enumerate() if each.name == "modelserve-m-1"]
    answer = asyncio.run(ask(app))
    assert (answer.status, told()) == (200, [LATE, AGAIN, LOST])
    replica.join(20)
    assert not replica.is_alive()
    for task in left:  # so that the test leaves nothing pending
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()


def test_it_closes_when_the_interpreter_exits(registry: ms.Registry, tmp_path: Path) -> None:
    """A program that never closes anything ends by itself, with its signal handlers and its workers as before."""
    result = run_script(
        f"""
        import asyncio, os, signal
        import modelserve as ms
        from tests.http.driver import call_asgi
        def handlers():
            return [signal.getsignal(each) for each in signal.valid_signals()]
        before = handlers()
        options = ms.ModelOptions(executor="process")
        server = ms.AsyncModelServer(ms.Registry("{registry.shown_url}"), {{"m": options}}, cache_dir="cache")
        app = ms.asgi(server)
        for _ in range(2):
            print(asyncio.run(call_asgi(app, "POST", "/predict/m", {BODY!r})).status)
        print(handlers() == before, server.status()[0].pool.replicas[0].detail["pid"])
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    *rest, pid = result.stdout.split()
    assert rest == ["200", "200", "True"]
    assert not Path(f"/proc/{pid}").exists()


# -- hosts without a lifespan ------------------------------------------------------------------------------


class Lifespan(Messages):
    """What a web server says to an app that it starts and stops; ``states`` are the server's at each answer."""

    def __init__(self, server: ms.AsyncModelServer) -> None:
        super().__init__([])
        self._server = server
        self._said = iter(("lifespan.startup", "lifespan.shutdown"))
        self.states: list[str] = []

    async def receive(self) -> Message:
        return {"type": next(self._said)}

    async def send(self, message: Message) -> None:
        await super().send(message)
        self.states.append(self._server.state)


async def returns_at_once(scope: Any, receive: Any, send: Any) -> None:
    """Ignore what is not HTTP."""


@pytest.mark.parametrize("host", [without_lifespan, returns_at_once])
async def test_in_front_of_a_host_without_a_lifespan(
    server: ms.AsyncModelServer, told: Callable[[], list[str]], host: App
) -> None:
    """The face starts and stops the server itself, as if it stood alone."""
    lifespan = Lifespan(server)
    app = ms.asgi(server, prefix="/ml", otherwise=host)
    await app({"type": "lifespan"}, lifespan.receive, lifespan.send)
    assert [message["type"] for message in lifespan.sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert (lifespan.states, told()) == (["running", "closed"], [])


async def test_a_host_whose_startup_fails_is_not_overruled(server: ms.AsyncModelServer) -> None:
    """An error of a host that has a lifespan is the host's, and reaches the web server."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise KeyError("DATABASE_URL")

    lifespan = Lifespan(server)
    with pytest.raises(KeyError):
        await ms.asgi(server, prefix="/ml", otherwise=failing)({"type": "lifespan"}, lifespan.receive, lifespan.send)
    assert (lifespan.sent, server.state) == ([], "not started")


# -- paths -------------------------------------------------------------------------------------------------


def test_two_mounts_of_one_server_in_a_loop_for_each_request(
    server: ms.AsyncModelServer, told: Callable[[], list[str]]
) -> None:
    """What one mount has started, and its loop has ended, the other goes on with."""
    app = Starlette(routes=[Mount("/one", ms.asgi(server)), Mount("/two", ms.asgi(server, routes="predict"))])
    client = TestClient(app)
    statuses = [client.post(f"/{mount}/predict/m", content=BODY).status_code for mount in ("one", "two") * 4]
    assert statuses == [200] * 8
    assert told() == [LATE, AGAIN]


async def test_a_slash_at_the_end_is_forgiven(server: ms.AsyncModelServer) -> None:
    """Routers that put one there, and clients that do, reach the same route."""
    app = mounted(server)
    assert (await call_asgi(app, "POST", "/ml/predict/m/", BODY)).status == 200
    assert (await call_asgi(app, "GET", "/ml/models/", b"")).status == 200
    assert (await call_asgi(app, "POST", "/ml/predict/m//", BODY)).status == 404
    await server.close()
