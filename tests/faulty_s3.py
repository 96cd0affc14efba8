"""A proxy in front of the S3 server that does to objects what networks and stores do, a counted number of times."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests import servers

FOREVER: Final = 10**9
STALL_S: Final = 0.5
_PIECE: Final = 64 * 1024
_REFUSALS: Final = {
    "403": (403, "AccessDenied"),
    "404": (404, "NoSuchKey"),
    "400": (400, "InvalidRequest"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "ExpiredToken": (400, "ExpiredToken"),
    "no bucket": (404, "NoSuchBucket"),
}


def _nothing() -> None:
    """Let nothing happen elsewhere."""


class FaultyS3:
    """What the proxy is to do, and what it saw.

    ``fault`` is done to the next ``times`` requests for objects, and to a body ``after`` so many bytes:
    a refusal (``403``, ``404``, ``400``, ``500``, ``503``, ``ExpiredToken``, ``no bucket``), ``reset`` (the connection
    is reset in the middle), ``truncated`` (it is closed there, in all politeness), ``short`` (the headers lie too),
    ``flipped`` (one bit is another), ``stalled`` (nothing more arrives), ``no ranges`` (they are ignored).
    """

    def __init__(self, upstream: str, artifacts: servers.S3Artifacts, behind: servers.S3Artifacts) -> None:
        self.upstream = urllib.parse.urlsplit(upstream)
        self.artifacts = artifacts
        """The artifact root as it is reached through the proxy; one on which nothing arrives for ``STALL_S`` breaks."""
        self.behind = behind
        """The same root without the proxy."""
        self.gets: list[str] = []
        """For each GET of an object, the range it asked for: ``""`` for the whole."""
        self.requests = 0
        self.before_refusal: Callable[[], object] = _nothing
        self.before_break: Callable[[], object] = _nothing
        """What happens elsewhere just before a request is refused, or a body breaks off."""
        self.sent = 0
        self.seen = threading.Event()
        """Set when the fault was done once."""
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._fault, self._left, self.after = "", 0, 0

    def do(self, fault: str, *, times: int = 1, after: int = 0) -> None:
        """Let something go wrong from now on."""
        with self._lock:
            self._fault, self._left, self.after = fault, times, after
            self.seen.clear()

    def heal(self) -> None:
        """Let everything go right again."""
        self.do("", times=0)

    def fault_of(self, method: str, path: str, asked: str) -> str:
        """Count a request; return what to do to it."""
        is_object = method == "GET" and "/sha256/" in path
        with self._lock:
            self.requests += 1
            if not is_object:
                return ""
            self.gets.append(asked)
            if not self._left:
                return ""
            self._left -= 1
            self.seen.set()
            return self._fault


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    faulty: FaultyS3

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed leave broken connections; that is no news here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _pass_on(self) -> None:
        faulty = self.server.faulty
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = faulty.fault_of(self.command, self.path, self.headers.get("Range", ""))
        if fault in _REFUSALS:
            faulty.before_refusal()
            self._refuse(*_REFUSALS[fault])
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if fault == "no ranges":
            headers.pop("Range", None)
        upstream = http.client.HTTPConnection(str(faulty.upstream.hostname), faulty.upstream.port or 80)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, headers)
            self._answer(upstream.getresponse(), fault)

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def do_PUT(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>see http://secret.host</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, answer: http.client.HTTPResponse, fault: str) -> None:
        after = self.server.faulty.after
        length = int(answer.headers.get("Content-Length") or 0)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"connection", "content-length", "date", "server", "transfer-encoding"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(min(after, length) if fault == "short" else length))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer, fault, after)

    def _send_body(self, answer: http.client.HTTPResponse, fault: str, after: int) -> None:
        done = 0
        while piece := answer.read(_PIECE):
            if fault in {"reset", "truncated", "short", "stalled"} and done + len(piece) > after:
                self._write(piece[: after - done])
                self._break_off(fault)
                return
            if fault == "flipped" and done <= after < done + len(piece):
                damaged = bytearray(piece)
                damaged[after - done] ^= 1
                piece = bytes(damaged)
            self._write(piece)
            done += len(piece)

    def _write(self, piece: bytes) -> None:
        self.wfile.write(piece)
        self.server.faulty.sent += len(piece)

    def _break_off(self, fault: str) -> None:
        self.close_connection = fault != "short"
        self.server.faulty.before_break()
        if fault == "stalled":
            self.server.faulty.ended.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # close() would wait for the files made of the socket

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def behind_a_proxy(artifacts: servers.S3Artifacts, upstream: str) -> Iterator[FaultyS3]:
    """Run a proxy in front of an S3 server, and give what steers it."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        location = {
            **artifacts.storage_options["client_kwargs"],
            "endpoint_url": f"http://127.0.0.1:{server.server_port}",
        }
        options = {**artifacts.storage_options, "client_kwargs": location, "config_kwargs": {"read_timeout": STALL_S}}
        faulty = server.faulty = FaultyS3(upstream, servers.S3Artifacts(artifacts.url, options), artifacts)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        try:
            yield faulty
        finally:
            faulty.ended.set()
            server.shutdown()
            serving.join()
