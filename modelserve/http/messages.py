"""A request and a response, as any web server has them."""

from __future__ import annotations

from typing import NamedTuple


class Request(NamedTuple):
    """``path`` is relative to the mount, ``root`` is where the mount is; the headers are the ones that matter here."""

    method: str
    path: str
    body: bytes
    content_type: str
    request_id: str | None
    root: str
    query: bytes = b""


class Response(NamedTuple):
    """``headers`` are the ones besides content type and length."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
