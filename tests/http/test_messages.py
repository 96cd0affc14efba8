"""What a request carries: the headers that are read somewhere, and the query, the same from either face."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import modelserve as ms
from modelserve.http.api import Api
from modelserve.http.messages import HEADERS, Request, Response, content_length, request_id_in
from tests.http.driver import Headers, call_wsgi, connection, head_of, read_answer, scope_of, uvicorn_serving
from tests.http.test_openapi import in_any_loop


@pytest.fixture(params=["asgi", "wsgi"])
def carried(
    request: pytest.FixtureRequest, server: ms.ModelServer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Request]:
    """Send headers and a query through a face; return the request that it makes of them."""
    seen: list[Request] = []

    async def note(_: Api, sent: Request) -> Response:
        seen.append(sent)
        return Response(200, b"{}")

    monkeypatch.setattr(Api, "__call__", note)

    def carry(headers: Headers = (), path: str = "/models") -> Request:
        if request.param == "wsgi":
            call_wsgi(ms.wsgi(server), "GET", path, headers=headers, wsgi_input=b"")
        else:
            server.call(_through_asgi(ms.asgi(server.core), scope_of("GET", path, headers)))
        return seen[-1]

    return carry


async def _through_asgi(app: Callable[..., Awaitable[None]], scope: dict[str, Any]) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(_: Any) -> None: ...

    await app(scope, receive, send)


def test_only_headers_that_are_read_are_carried(carried: Callable[..., Request]) -> None:
    """Every header of the list arrives under its name; no other does."""
    sent = {name: f"{i}" for i, name in enumerate(HEADERS) if name != "content-length"}
    headers = dict(
        carried([*sent.items(), ("cookie", "secret"), ("authorization", "secret"), ("x-other", "1")]).headers
    )
    headers.pop("content-length", None)
    assert headers == sent


def test_over_a_socket_case_means_nothing_and_text_is_utf_8(server: ms.ModelServer) -> None:
    """A web server writes the names in lower case, and hands the bytes of a value on as they are."""
    body = b'{"inputs": {"x": [1, 2, 3, 4]}}'
    sent = head_of("/predict/trees", "x-REQUEST-Id: @", f"Content-LENGTH: {len(body)}").replace(b"@", "é-1".encode())
    with uvicorn_serving(in_any_loop(server, ms.asgi(server.core))) as address, connection(address) as conn:
        conn.sendall(sent + body)
        answer = read_answer(conn)
    assert answer is not None
    assert (answer.status, answer.json()["request_id"]) == (200, "é-1")


def test_every_byte_of_a_header_arrives(carried: Callable[..., Request]) -> None:
    """Latin-1 has a character for each byte, so that none of them is an error; the reader decodes further."""
    value = "".join(map(chr, range(32, 256)))
    assert carried([("x-routing-key", value)]).headers["x-routing-key"] == value


def test_the_query_is_read_when_it_is_asked_for(carried: Callable[..., Request]) -> None:
    """Escapes and plus signs are resolved, empty values kept; of a repeated name the last value counts."""
    request = carried(path="/models?a=1&b=%C3%A9+%2F&c=&a=2&d")
    assert request.query_string == b"a=1&b=%C3%A9+%2F&c=&a=2&d"
    assert request.query == {"a": "2", "b": "é /", "c": "", "d": ""}
    assert carried().query == {}


def test_of_repeated_headers_lists_are_joined_and_the_last_of_others_counts(server: ms.ModelServer) -> None:
    """RFC 9110 joins lists; of a header that has one value, the one nearest to this server was set last."""
    seen: list[Request] = []

    async def note(request: Request) -> Response:
        seen.append(request)
        return Response(200, b"{}")

    app = ms.asgi(server.core)
    app._api = note  # type: ignore[assignment]
    sent = [("accept-encoding", "br"), ("traceparent", "a"), ("accept-encoding", "gzip"), ("traceparent", "b")]
    server.call(_through_asgi(app, scope_of("GET", "/models", sent)))
    assert seen[0].headers == {"accept-encoding": "br, gzip", "traceparent": "b"}


@pytest.mark.parametrize(
    ("declared", "length"),
    [("0", 0), ("17", 17), ("9" * 5000, 10**18 - 1), ("", None), ("-1", None), ("1e3", None), ("\xb2", None)],
)
def test_a_length_is_digits(declared: str, length: int | None) -> None:
    """Anything else declares nothing, and no number of digits is too much to read."""
    assert content_length({"content-length": declared}) == length
    assert content_length({}) is None


def test_a_request_id_that_cannot_be_used_is_none() -> None:
    """A caller's own id is taken if it follows the rule."""
    assert [request_id_in({"x-request-id": sent}) for sent in ("a b", "", "caf\xe9", "caf\xc3\xa9")] == [
        "a b",
        None,
        None,
        "café",
    ]
    assert request_id_in({}) is None
