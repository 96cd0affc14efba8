"""The WSGI face: under real servers and dispatchers, started after the fork, and exact about bodies."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import make_server
from werkzeug.test import Client

import modelserve as ms
from tests.http.driver import (
    JSON,
    Caller,
    Subject,
    call_wsgi,
    connection,
    head_of,
    predict,
    read_answer,
)

GOOD = b'{"inputs": {"x": [0.5, -1.5, 2, 0.25]}}'
LIMIT = 1000


@pytest.fixture
def unstarted(registry: ms.Registry, options: dict[str, ms.ModelOptions], tmp_path: Path) -> Iterator[ms.ModelServer]:
    """A server that nobody has started yet."""
    server = ms.ModelServer(registry, options, cache_dir=tmp_path / "cache", poll_s=3600)
    yield server
    server.close()


def caller(app: Any) -> Caller:
    """Return what calls a WSGI app."""
    return lambda method, path, body=b"", headers=(JSON,): call_wsgi(app, method, path, body, headers)


# -- inside a host -----------------------------------------------------------------------------------------


def test_dispatched_beside_a_flask_app(server: ms.ModelServer, subjects: dict[str, Subject]) -> None:
    """Under its prefix the models answer, elsewhere Flask does."""
    flask = Flask("host")
    flask.add_url_rule("/", view_func=lambda: "the host")
    client = Client(DispatcherMiddleware(flask, {"/ml": ms.wsgi(server)}))
    for subject in subjects.values():
        response = client.post(f"/ml/predict/{subject.model_name}", json={"inputs": dict(subject.good)})
        assert response.status == "200 OK"
        assert subject.agrees(subject.good, json.loads(response.data)["prediction"])
    assert json.loads(client.get("/ml/openapi.json").data)["servers"] == [{"url": "/ml"}]
    assert client.get("/").data == b"the host"
    assert client.get("/models").status_code == 404
    assert client.get("/ml").status_code == 404
    assert client.head("/ml/models").data == b""


def test_it_keeps_to_the_letter_of_wsgi(server: ms.ModelServer) -> None:
    """The standard library's validator finds nothing to complain about, in answers and problems alike."""
    app = validator(ms.wsgi(server, max_body_bytes=LIMIT))
    sent: list[tuple[str, str, bytes]] = [
        ("POST", "/predict/trees", GOOD),
        ("POST", "/predict/trees", b"{"),
        ("POST", "/predict/trees", b" " * (LIMIT + 1)),
        ("PUT", "/models", b""),
        ("HEAD", "/models", b""),
        ("GET", "/models", b""),
    ]
    for (method, path, body), status in zip(sent, ["200", "400", "413", "405", "200", "200"], strict=True):
        client = Client(app)
        response = client.open(path, method=method, data=body, content_type="application/json")
        response.close()
        assert response.status.startswith(status)
        assert "connection" not in response.headers


def test_status_lines_have_their_phrase(server: ms.ModelServer) -> None:
    """A status is a number and its words."""
    lines = []
    app = ms.wsgi(server)
    for path in ("/predict/trees", "/nothing"):
        environ = {"REQUEST_METHOD": "POST", "PATH_INFO": path, "CONTENT_LENGTH": "2", "wsgi.input": io.BytesIO(b"{}")}
        app(environ, lambda status, _: lines.append(status))
    assert lines == ["422 Unprocessable Entity", "404 Not Found"]


def test_a_path_is_utf_8(server: ms.ModelServer) -> None:
    """The bytes that PEP 3333 hides in a latin-1 string are read as what they are, broken ones too."""
    answer = call_wsgi(ms.wsgi(server), "GET", "/models/modèle")
    assert answer.problem()["detail"] == "no model named 'modèle'"
    assert call_wsgi(ms.wsgi(server), "GET", "/", PATH_INFO="/models/\xff\xfe").status == 404


def test_it_takes_a_sync_server_only(server: ms.ModelServer) -> None:
    """The other server is refused with the name of its own face."""
    with pytest.raises(TypeError, match=r"ms\.asgi takes an AsyncModelServer"):
        ms.wsgi(server.core)  # type: ignore[arg-type]


# -- starting ----------------------------------------------------------------------------------------------


def test_an_unstarted_server_starts_at_the_first_request(
    unstarted: ms.ModelServer, subjects: dict[str, Subject]
) -> None:
    """Making the app starts nothing; the first request does."""
    app = ms.wsgi(unstarted)
    assert not unstarted.started
    subjects["trees"].check_serves(caller(app))
    assert unstarted.started


def test_first_requests_that_come_together_are_all_answered(
    unstarted: ms.ModelServer, subjects: dict[str, Subject]
) -> None:
    """While one request starts the server the others wait for it; none is turned away."""
    call = caller(ms.wsgi(unstarted))
    together = threading.Barrier(8)

    def first(_: int) -> int:
        together.wait()
        return predict(call, "trees", subjects["trees"].good).status

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(first, range(8))) == [200] * 8
    assert [thread.name for thread in threading.enumerate()].count("modelserve") <= 2  # with the shared fixture's


def test_a_closed_server_stays_closed(unstarted: ms.ModelServer) -> None:
    """A request that comes too late does not bring the server back to life."""
    call = caller(ms.wsgi(unstarted))
    assert call("GET", "/health/ready").status == 200
    unstarted.close()
    assert call("GET", "/models").problem()["type"] == "urn:modelserve:problem:not-ready"
    assert not unstarted.started


def test_a_start_that_fails_is_tried_again(registry: ms.Registry, tmp_path: Path) -> None:
    """The client learns nothing of the cause; once it is gone, requests are answered."""
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("a file where a folder should be")
    server = ms.ModelServer(registry, cache_dir=in_the_way, poll_s=3600)
    call = caller(ms.wsgi(server))
    assert call("GET", "/models").problem()["status"] >= 500
    in_the_way.unlink()
    assert call("GET", "/models").status == 200
    server.close()


# -- bodies ------------------------------------------------------------------------------------------------


class Trickle(io.RawIOBase):
    """A stream that gives a few bytes at a time, counts them, and may break."""

    def __init__(self, data: bytes, *, most: int = 3, breaks: bool = False) -> None:
        self._data = io.BytesIO(data)
        self._most = most
        self._breaks = breaks
        self.given = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._data.read(min(self._most, size) if size >= 0 else self._most)
        if not data and self._breaks:
            raise ConnectionResetError("the client is gone from /secret/socket")
        self.given += len(data)
        return data


def post(server: ms.ModelServer, body: Any, **environ: Any) -> Any:
    """Post a body to a model under a small limit."""
    return call_wsgi(ms.wsgi(server, max_body_bytes=LIMIT), "POST", "/predict/trees", body, **environ)


def test_streams_that_give_little_at_a_time_are_read_to_the_end(server: ms.ModelServer) -> None:
    """Short reads are put together, with a declared length and without."""
    assert post(server, Trickle(GOOD), CONTENT_LENGTH=str(len(GOOD))).status == 200
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    assert post(server, Trickle(GOOD), **chunked).status == 200


def test_only_what_was_declared_is_read(server: ms.ModelServer) -> None:
    """What follows on the connection is the next request's."""
    stream = Trickle(GOOD + b"GET / HTTP/1.1")
    assert post(server, stream, CONTENT_LENGTH=str(len(GOOD))).status == 200
    assert stream.given == len(GOOD)


def test_a_body_declared_too_large_is_not_read(server: ms.ModelServer) -> None:
    """The refusal costs no memory and no time."""
    for length in (str(LIMIT + 1), str(2 * 1024**3), "9" * 5000):
        stream = Trickle(GOOD)
        answer = post(server, stream, CONTENT_LENGTH=length)
        assert (answer.status, answer.problem()["type"]) == (413, "urn:modelserve:problem:content-too-large")
        assert stream.given == 0


def test_a_body_without_end_is_read_up_to_the_limit(server: ms.ModelServer) -> None:
    """One byte more than the limit is enough to know."""
    stream = Trickle(b" " * 100_000, most=64)
    answer = post(server, stream, HTTP_TRANSFER_ENCODING="chunked", **{"wsgi.input_terminated": True})
    assert (answer.status, stream.given) == (413, LIMIT + 1)


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
@pytest.mark.parametrize("declared", [True, False])
def test_the_limit_is_exact(server: ms.ModelServer, size: int, status: int, *, declared: bool) -> None:
    """A body of just the limit passes, one byte more does not."""
    stream = Trickle(GOOD + b" " * (size - len(GOOD)), most=10_000)
    environ: dict[str, Any] = {"CONTENT_LENGTH": str(size)} if declared else {"wsgi.input_terminated": True}
    assert post(server, stream, **environ).status == status


def test_a_body_that_breaks_off(server: ms.ModelServer) -> None:
    """A client that leaves early, with an error or without, is no error of the server's."""
    broken = post(server, Trickle(GOOD[:9], breaks=True), CONTENT_LENGTH=str(len(GOOD)))
    assert (broken.status, broken.problem()["type"]) == (400, "urn:modelserve:problem:unreadable-body")
    ended = post(server, Trickle(GOOD[:9]), CONTENT_LENGTH=str(len(GOOD)))
    assert (ended.status, ended.problem()["type"]) == (400, "urn:modelserve:problem:malformed-json")


def test_a_chunked_body_whose_end_the_server_does_not_tell(server: ms.ModelServer) -> None:
    """Reading on could wait for ever, so a length is asked for."""
    stream = Trickle(GOOD)
    answer = post(server, stream, HTTP_TRANSFER_ENCODING="chunked")
    assert (answer.status, answer.problem()["type"]) == (411, "urn:modelserve:problem:length-required")
    assert stream.given == 0


@pytest.mark.parametrize("length", ["", "abc", "-1", "+5", "1e3", "²", "٣", " 5", "0x10"])
def test_a_length_that_is_no_number_is_no_length(server: ms.ModelServer, length: str) -> None:
    """Nothing is read on the word of such a header."""
    stream = Trickle(GOOD)
    answer = post(server, stream, CONTENT_LENGTH=length)
    assert (answer.status, answer.problem()["type"], stream.given) == (400, "urn:modelserve:problem:malformed-json", 0)


# -- over a socket -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(server: ms.ModelServer) -> Iterator[tuple[str, int]]:
    """The address of a threaded WSGI server that understands chunks."""
    web_server = make_server("127.0.0.1", 0, ms.wsgi(server, max_body_bytes=100_000), threaded=True)
    web_server.log = lambda *_, **__: None  # type: ignore[method-assign]
    thread = threading.Thread(target=web_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield "127.0.0.1", web_server.server_port
    web_server.shutdown()
    thread.join()
    web_server.server_close()


def test_chunks_of_one_byte_over_a_socket(address: tuple[str, int], subjects: dict[str, Subject]) -> None:
    """A real server's chunks arrive as one body."""
    with connection(address) as conn:
        conn.sendall(head_of("/predict/trees", "Transfer-Encoding: chunked"))
        conn.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n")
        answer = read_answer(conn)
    assert answer is not None
    assert subjects["trees"].agrees({"x": [0.5, -1.5, 2, 0.25]}, answer.json()["prediction"])


def test_broken_chunks_over_a_socket(address: tuple[str, int]) -> None:
    """Framing that is none is the client's mistake."""
    with connection(address) as conn:
        conn.sendall(head_of("/predict/trees", "Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n")
        answer = read_answer(conn)
    assert answer is not None
    assert (answer.status, answer.problem()["type"]) == (400, "urn:modelserve:problem:unreadable-body")


def test_many_threads_are_answered_each_with_its_own(address: tuple[str, int]) -> None:
    """Concurrent requests over sockets share batches and never answers."""

    def ask(i: int) -> Any:
        body = json.dumps({"inputs": {"x": [[i, -i, 0], [0, 0, 0]]}}).encode()
        with connection(address) as conn:
            conn.sendall(head_of("/predict/tiles", f"Content-Length: {len(body)}") + body)
            answer = read_answer(conn)
        assert answer is not None
        return answer.json()["prediction"][0][0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(100))) == list(range(100))
