"""The WSGI face: for Flask, Django and any other host that answers in threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeAlias

from modelserve.http.api import Api
from modelserve.http.endpoints import Families
from modelserve.http.messages import HEADERS, Request, Response, content_length, request_id_in
from modelserve.http.problems import HttpProblem, problem_response
from modelserve.signature import MAX_BODY_BYTES
from modelserve.sync_server import ModelServer

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Any]

_BARE: Final = ("content-type", "content-length")  # CGI's names for these have no HTTP_ in front
_HEADERS: Final = {name: ("" if name in _BARE else "HTTP_") + name.upper().replace("-", "_") for name in HEADERS}


class WsgiFace:
    """Answers HTTP with a server's predictions. An unstarted server is started at the first request, after the fork."""

    def __init__(self, server: ModelServer, *, max_body_bytes: int = MAX_BODY_BYTES, routes: Families = None) -> None:
        if not isinstance(server, ModelServer):
            msg = f"ms.wsgi takes a ModelServer, not a {type(server).__name__}; ms.asgi takes an AsyncModelServer"
            raise TypeError(msg)
        self._server = server
        self._api = Api(server.core, routes)
        self._max_body_bytes = max_body_bytes
        self._starting = threading.Lock()
        self._started_in = 0

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one WSGI request."""
        headers = {name: environ[key] for name, key in _HEADERS.items() if key in environ}
        request_id = request_id_in(headers)
        try:
            if self._started_in != os.getpid():
                self._start()
            response = self._server.call(self._api(self._request(environ, headers, request_id)))
        except Exception as error:  # noqa: BLE001  # the outermost frame: what comes here becomes a response
            response = problem_response(error, request_id)
        return _send(start_response, response, head=environ["REQUEST_METHOD"] == "HEAD")

    def _start(self) -> None:
        """Start the server once per process. Requests that come meanwhile wait; one that was closed stays closed."""
        with self._starting:
            if self._started_in != os.getpid():
                self._server.start()
                self._started_in = os.getpid()

    def _request(self, environ: Environ, headers: Mapping[str, str], request_id: str | None) -> Request:
        return Request(
            method="GET" if environ["REQUEST_METHOD"] == "HEAD" else environ["REQUEST_METHOD"],
            path=environ.get("PATH_INFO", "").encode("latin-1").decode(errors="replace"),
            body=self._body(environ, content_length(headers)),
            headers=headers,
            request_id=request_id or self._server.core.new_request_id(),
            root=environ.get("SCRIPT_NAME", ""),
            query_string=environ.get("QUERY_STRING", "").encode("latin-1"),
        )

    def _body(self, environ: Environ, length: int | None) -> bytes:
        if length is not None:
            if length > self._max_body_bytes:
                raise self._too_large()
            return self._read(environ, length)
        if environ.get("wsgi.input_terminated"):
            body = self._read(environ, self._max_body_bytes + 1)
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            return body
        if "HTTP_TRANSFER_ENCODING" in environ:
            # Reading on could wait for ever: this server does not say where a chunked body ends.
            raise HttpProblem(411, "length-required", "this server takes bodies with a Content-Length only")
        return b""

    def _read(self, environ: Environ, size: int) -> bytes:
        """Read ``size`` bytes, or up to the end if that comes first. A stream may give less than it is asked for."""
        chunks = bytearray()
        try:
            while len(chunks) < size and (chunk := environ["wsgi.input"].read(size - len(chunks))):
                chunks += chunk
        except OSError as error:
            raise HttpProblem(400, "unreadable-body", "the body could not be read to its end") from error
        return bytes(chunks)

    def _too_large(self) -> HttpProblem:
        return HttpProblem(413, "content-too-large", f"the body is larger than {self._max_body_bytes} bytes")


def _send(start_response: StartResponse, response: Response, *, head: bool) -> Iterable[bytes]:
    headers = [("Content-Type", response.content_type), ("Content-Length", str(len(response.body)))]
    # Whether a connection closes is the server's business in WSGI (PEP 3333 forbids hop-by-hop headers).
    headers += [(name.title(), value) for name, value in response.headers if name != "connection"]
    start_response(f"{response.status} {HTTPStatus(response.status).phrase}", headers)
    return [b"" if head else response.body]


def wsgi(server: ModelServer, *, max_body_bytes: int = MAX_BODY_BYTES, routes: Families = None) -> WsgiFace:
    """Return a server's WSGI app: ``DispatcherMiddleware(flask_app, {"/ml": ms.wsgi(server)})``.

    Uses a started server, or starts it at the first request, after the web server's fork. Bodies over
    ``max_body_bytes`` get a 413. ``routes`` names the routes that are answered, as in :func:`modelserve.asgi`.
    """
    return WsgiFace(server, max_body_bytes=max_body_bytes, routes=routes)
