"""A request and a response, as any web server has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

import orjson

from modelserve.ids import is_request_id

HEADERS: Final = (
    "content-type",
    "content-length",
    "content-encoding",
    "accept-encoding",
    "x-request-id",
    "x-routing-key",
    "idempotency-key",
    "inference-header-content-length",
    "traceparent",
)
"""The headers that a request carries, by their names in lower case; others, such as cookies, stay outside."""
LISTS: Final = frozenset({"content-encoding", "accept-encoding"})
"""Those whose repetitions are one list (RFC 9110, 5.3). Of any other the last counts: the nearest proxy set it."""
_ENCODE: Final = orjson.OPT_SERIALIZE_NUMPY
_LENGTH_DIGITS: Final = 18  # enough to be too large; int() refuses thousands of them


class Request(NamedTuple):
    """``path`` is relative to the mount, ``root`` is where the mount is.

    ``headers`` are those of :data:`HEADERS` that were sent, decoded as Latin-1, which has a character for every byte.
    """

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    request_id: str
    root: str = ""
    query_string: bytes = b""

    @property
    def query(self) -> dict[str, str]:
        """The parameters behind the question mark; of one that is repeated, the last."""
        return dict(parse_qsl(self.query_string.decode("latin-1"), keep_blank_values=True))


class Response(NamedTuple):
    """``headers`` are the ones besides content type and length."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def json_response(document: dict[str, Any], status: int = 200) -> Response:
    """Return a document as JSON, arrays included. Raises ``TypeError`` for a value that has no JSON form."""
    return Response(status, orjson.dumps(document, option=_ENCODE))


def text_of(header: str) -> str:
    """Return a header's value as the text that it is in UTF-8; bytes that are none become unprintable."""
    return header if header.isascii() else header.encode("latin-1").decode(errors="surrogateescape")


def request_id_in(headers: Mapping[str, str]) -> str | None:
    """Return the caller's own request id; None where there is none, or one that cannot be used.

    Such an id is replaced, not refused: proxies set it, and a prediction must not fail for it.
    """
    sent = headers.get("x-request-id")
    return text if sent is not None and is_request_id(text := text_of(sent)) else None


def content_length(headers: Mapping[str, str]) -> int | None:
    """Return the length that is declared for the body; None where none is, or no number."""
    declared = headers.get("content-length", "")
    return int(declared[:_LENGTH_DIGITS]) if declared.isascii() and declared.isdigit() else None
