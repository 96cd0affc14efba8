"""Errors as HTTP responses: RFC 9457 ``application/problem+json``.

What a client reads is chosen here. Messages about the client's own request pass through; one that could name a path,
a host or a class of ours is replaced by a fixed sentence.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import orjson

from modelserve import errors
from modelserve.http.messages import Response

_log = logging.getLogger("modelserve")


class HttpProblem(errors.ModelServeError):
    """A fault of the HTTP request itself, before any model is involved."""

    def __init__(self, status: int, kind: str, detail: str, *, field: str | None = None, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.field = field
        self.headers = headers


_KINDS: Final[dict[type[Exception], tuple[int, str, str | None]]] = {
    errors.InvalidInput: (422, "invalid-input", None),
    errors.NotFound: (404, "not-found", None),
    errors.Conflict: (409, "conflict", None),
    errors.Overloaded: (503, "overloaded", None),
    errors.NotRunning: (503, "not-ready", None),
    errors.NotReady: (503, "not-ready", "no version of this model is ready to answer"),
    errors.Unavailable: (503, "unavailable", "a system behind this service does not answer"),
    errors.DeadlineExceeded: (504, "deadline-exceeded", None),
    errors.WorkerDied: (500, "worker-died", "the worker that held this request died"),
    errors.InferenceFailed: (500, "inference-failed", "the model failed on this input"),
}
_UNEXPECTED: Final = (500, "internal-error", "an unexpected error; the server's log has the details")


def problem_response(error: Exception, request_id: str | None = None) -> Response:
    """Return the response for an error. One that was not foreseen is logged, and its text kept from the client."""
    if isinstance(error, HttpProblem):
        return _response(error.status, error.kind, str(error), request_id, field=error.field, headers=error.headers)
    status, kind, fixed = next((_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS), _UNEXPECTED)
    if status == 500:  # noqa: PLR2004
        _log.error("request %s failed: %s", request_id or "?", error, exc_info=error)
    field = (error.field or None) if isinstance(error, errors.InvalidInput) else None
    retry_after = error.retry_after if isinstance(error, errors.Overloaded) else None
    headers = {} if retry_after is None else {"retry-after": str(math.ceil(retry_after))}
    return _response(status, kind, fixed or str(error), request_id, field=field, headers=headers)


def _response(
    status: int, kind: str, detail: str, request_id: str | None, *, headers: dict[str, str], field: str | None = None
) -> Response:
    document = {"type": f"urn:modelserve:problem:{kind}", "title": kind.replace("-", " "), "status": status}
    document["detail"] = detail
    if field is not None:
        document["field"] = field
    if request_id is not None:
        document["request_id"] = request_id
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, _encode(document), "application/problem+json", tuple(names.items()))


def _encode(document: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(document)
    except TypeError:
        # A client may have sent a name with lone surrogates, which no UTF-8 document can repeat.
        clean = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in document.items()}
        return orjson.dumps(clean)
