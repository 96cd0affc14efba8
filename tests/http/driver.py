"""What the tests of the HTTP faces share: callers of apps, in process and over sockets, and a look at the answers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
import uvicorn

import modelserve as ms
from modelserve import errors

App: TypeAlias = Callable[..., Awaitable[None]]
Message: TypeAlias = MutableMapping[str, Any]
Headers: TypeAlias = Sequence[tuple[str, str]]

JSON = ("content-type", "application/json")


# -- answers -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response. ``headers`` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body, read as strictly as JSON can be read."""
        assert int(self.headers["content-length"]) == len(self.body)
        return strict_json(self.body)

    def problem(self, sent: bytes = b"") -> dict[str, Any]:
        """Return the body, which must be a problem document that tells no secrets but those that were sent."""
        assert self.headers["content-type"] == "application/problem+json"
        document = self.json()
        assert document["status"] == self.status
        assert document["type"].startswith("urn:modelserve:problem:")
        assert document.keys() <= {"type", "title", "status", "detail", "field", "request_id"}
        assert all(isinstance(document[name], str) and document[name] for name in document.keys() - {"status"})
        assert [secret for secret in secrets_in(self.body) if secret.encode() not in sent] == []
        return document  # type: ignore[no-any-return]


def strict_json(text: bytes) -> Any:
    """Read JSON; refuse NaN, Infinity, duplicate keys, lone surrogates and anything but UTF-8."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key comes twice"
        return dict(pairs)

    document = json.loads(text.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


_CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type) and name != "Any"}
_SECRET = re.compile(
    r"Traceback|\bFile \"|\.py\b|site-packages|/(?:home|tmp|root|secret)/|://|password|sqlite|postgres"
    rf"|\b[A-Z]\w*(?:Error|Exception|Warning)\b|\b(?:{'|'.join(_CLASSES)})\b|modelserve\.\w"
)


def secrets_in(body: bytes) -> list[str]:
    """Return what in a response looks like a traceback, a path, an address or a class name."""
    return _SECRET.findall(body.decode("utf-8"))


# -- callers -----------------------------------------------------------------------------------------------


def scope_of(method: str, path: str, headers: Headers = (), **more: Any) -> dict[str, Any]:
    """Return an ASGI scope as a server would make it; ``path`` may have a query."""
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(errors="replace"),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    } | more


class Messages:
    """The two ends of an ASGI call: ``chunks`` go in, messages come out; ``received`` counts what was asked for."""

    def __init__(self, chunks: Sequence[bytes], *, disconnect: bool = False) -> None:
        self._chunks = list(chunks)
        self._disconnect = disconnect
        self.received = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        self.received += 1
        if not self._chunks:
            return {"type": "http.disconnect"}
        chunk = self._chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks) or self._disconnect}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def answer(self) -> Answer:
        """Return the response, which must be a complete and well-formed one."""
        start, *parts = self.sent
        assert start["type"] == "http.response.start"
        assert [part["type"] for part in parts] == ["http.response.body"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
        assert all(name == name.lower() for name in headers)
        return Answer(start["status"], headers, parts[0]["body"])


async def call_asgi(
    app: App, method: str, path: str, body: bytes = b"", headers: Headers = (JSON,), **scope: Any
) -> Answer:
    """Call an ASGI app in the running loop."""
    messages = Messages([body])
    await app(scope_of(method, path, headers, **scope), messages.receive, messages.send)
    return messages.answer()


def call_wsgi(
    app: Callable[..., Iterable[bytes]],
    method: str,
    path: str,
    body: bytes | io.RawIOBase = b"",
    headers: Headers = (JSON,),
    **environ: Any,
) -> Answer:
    """Call a WSGI app with an environ as PEP 3333 has it; ``environ`` adds to it or replaces."""
    started: list[tuple[str, list[tuple[str, str]]]] = []
    stream = io.BytesIO(body) if isinstance(body, bytes) else body
    length = {"CONTENT_LENGTH": str(len(body))} if isinstance(body, bytes) else {}
    path, _, query = path.partition("?")
    basic = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path.encode().decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": stream,
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    parts = app(
        basic | length | _as_environ(headers) | environ, lambda status, fields: started.append((status, fields))
    )
    ((status, fields),) = started
    return Answer(int(status.split()[0]), {name.lower(): value for name, value in fields}, b"".join(parts))


def _as_environ(headers: Headers) -> dict[str, str]:
    names = {name: name.upper().replace("-", "_") for name, _ in headers}
    return {n if n == "CONTENT_TYPE" else f"HTTP_{n}": value for name, value in headers for n in (names[name],)}


class Caller(Protocol):
    """Sends one request to a served set of models."""

    def __call__(self, method: str, path: str, body: bytes = b"", headers: Headers = (JSON,)) -> Answer: ...


def asgi_caller(server: ms.ModelServer, app: App) -> Caller:
    """Call an app over a server's core in the loop that the core lives in."""

    def call(method: str, path: str, body: bytes = b"", headers: Headers = (JSON,)) -> Answer:
        return server.call(_call_asgi(app, method, path, body, headers))

    return call


async def _call_asgi(app: App, method: str, path: str, body: bytes, headers: Headers) -> Answer:
    return await call_asgi(app, method, path, body, headers)


def predict(call: Caller, model_name: str, inputs: Any) -> Answer:
    """Ask for one prediction."""
    return call("POST", f"/predict/{model_name}", json.dumps({"inputs": inputs}).encode())


def predict_many(call: Caller, model_name: str, instances: Any) -> Answer:
    """Ask for several predictions."""
    return call("POST", f"/predict/{model_name}", json.dumps({"instances": instances}).encode())


# -- what the bare models answer ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A model under test: how it is registered, a request that fits, and what the bare model answers to such."""

    model_name: str
    model: Any
    example: Any
    method: str
    good: Mapping[str, Any]
    bare: Callable[[Mapping[str, Any]], Any]

    def agrees(self, inputs: Mapping[str, Any], prediction: Any) -> bool:
        """Whether a prediction is what the bare model answers, but for the last digits of floats."""
        expected = np.asarray(self.bare(inputs), float)
        return expected.shape == np.shape(prediction) and np.allclose(expected, prediction, rtol=1e-9, atol=0)

    def check_serves(self, call: Caller) -> None:
        """Check that a good request is answered right."""
        answer = predict(call, self.model_name, self.good)
        assert answer.status == 200, answer.body
        assert self.agrees(self.good, answer.json()["prediction"])


def frame_of(inputs: Mapping[str, Any]) -> pd.DataFrame:
    """Return one row of the churn model's frame, in the order and with the dtypes it was trained on."""
    income = math.nan if inputs["income"] is None else float(inputs["income"])
    return pd.DataFrame(
        {
            "tenure": [int(inputs["tenure"])],
            "spend": [float(inputs["spend"])],
            "income": [income],
            "plan": [inputs["plan"]],
            "autopay": [inputs["autopay"]],
        }
    )


# -- over a socket -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def uvicorn_serving(app: App, **options: Any) -> Iterator[tuple[str, int]]:
    """Serve an app by uvicorn in a thread; give its address once it has started."""
    listener = socket.create_server(("127.0.0.1", 0))
    options = {"lifespan": "on"} | options
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5, **options)
    server = _Uvicorn(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    try:
        assert server.is_up.wait(30)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class _Uvicorn(uvicorn.Server):
    """Tells when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextlib.contextmanager
def connection(address: tuple[str, int]) -> Iterator[socket.socket]:
    """Open a connection on which every write leaves at once."""
    with socket.create_connection(address, timeout=20) as conn:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield conn


def head_of(path: str, *headers: str, method: str = "POST") -> bytes:
    """Return the head of a raw request."""
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def read_answer(conn: socket.socket, *, to_head: bool = False) -> Answer | None:
    """Read one response; None if the server has closed the connection without one."""
    with conn.makefile("rb") as stream:
        try:
            status_line = stream.readline()
        except ConnectionResetError:
            return None
        if not status_line:
            return None
        headers = {}
        while (line := stream.readline().rstrip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = b"" if to_head else stream.read(int(headers.get("content-length", 0)))
        return Answer(int(status_line.split()[1]), headers, body)


def socket_caller(address: tuple[str, int]) -> Caller:
    """Call over a connection of its own per request."""

    def call(method: str, path: str, body: bytes = b"", headers: Headers = (JSON,)) -> Answer:
        lines = [f"{name}: {value}" for name, value in headers if name != "content-type"]
        with connection(address) as conn:
            conn.sendall(head_of(path, *lines, f"Content-Length: {len(body)}", method=method) + body)
            answer = read_answer(conn, to_head=method == "HEAD")
        assert answer is not None
        return answer

    return call
