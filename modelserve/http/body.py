"""A request's body as the document it holds: an ordinary one at once, a large one in steps, once it was counted."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import orjson

from modelserve.errors import InvalidInput
from modelserve.http.messages import Request
from modelserve.http.problems import HttpProblem
from modelserve.http.scan import Malformed, Scan
from modelserve.http.slices import Slices
from modelserve.serving.version import LoadedVersion
from modelserve.signature import Extent
from modelserve.turns import Steps, in_turns
from modelserve.types import Json

AT_ONCE: Final = 128 * 1024
"""Bytes of a body that is parsed at once: two milliseconds at most."""
_JSON: Final = "application/json"
_MAX_DEPTH: Final = 64
_MANY: Final = 256  # lists and objects: fewer are not worth the switching
_COLLECTS_ON_ALLOCATION: Final = sys.version_info < (3, 12)  # later ones do so between two bytecodes alone


def require_json(request: Request) -> None:
    """Raise the problem for a body that does not claim to be JSON."""
    content_type = request.headers.get("content-type", _JSON)
    if content_type == _JSON:
        return
    media = content_type.partition(";")[0].strip().lower()
    if media and media != _JSON and not media.endswith("+json"):
        raise HttpProblem(415, "unsupported-media-type", "send the body as application/json", accept=_JSON)


def parsed(body: bytes) -> dict[str, Json]:
    """Return the document of an ordinary body."""
    nested = body.count(b"[") + body.count(b"{")
    try:
        document = orjson.loads(body) if nested < _MANY else loads(body)
    except orjson.JSONDecodeError as error:
        raise _malformed(f"the body is not JSON: {error}") from None
    if type(document) is not dict:
        raise InvalidInput("", "the body must be an object with 'inputs' or 'instances'")
    if nested > _MAX_DEPTH and _depth(document) > _MAX_DEPTH:
        raise _too_deep()
    return document


@contextlib.asynccontextmanager
async def read_in_turns(body: bytes, target: LoadedVersion) -> AsyncIterator[dict[str, Any]]:
    """Give the document of a large body, whose long lists are ``Pieces``; it is emptied afterwards.

    A body that holds more than any request to ``target`` is refused unparsed.
    """
    scan = Scan(body)
    try:
        await in_turns(_looking(scan, extent_of(target).within(len(body), target.options.queue_limit)))
    except Malformed as error:
        raise _malformed(f"the body is not JSON: {error}") from None
    slices = Slices(body, scan.cuts, loads)
    try:
        try:
            document = await in_turns(slices.steps())
        except Malformed as error:
            raise _malformed(f"the body is not JSON: {error}") from None
        if type(document) is not dict:
            raise InvalidInput("", "the body must be an object with 'inputs' or 'instances'")
        yield document
    finally:
        await in_turns(slices.release())


def extent_of(target: LoadedVersion) -> Extent:
    """Return what one row of a request to this version has at most."""
    plan = target.plan
    if plan is None:
        return Extent.of(target.signature.inputs)
    return Extent.of(plan.own, plan.overridable, plan.entities)


def _looking(scan: Scan, most: Extent) -> Steps[None]:
    for _ in scan.steps():
        if scan.depth > _MAX_DEPTH:
            raise _too_deep()
        for what, found, limit in (
            ("lists and objects", scan.containers, most.containers),
            ("values", scan.values, most.values),
            ("strings", scan.strings, most.strings),
        ):
            if found > limit:
                detail = f"the body holds more than {limit} {what}, the most that a request to this model can have"
                raise HttpProblem(413, "content-too-large", detail)
        yield


def _malformed(detail: str) -> HttpProblem:
    return HttpProblem(400, "malformed-json", detail)


def _too_deep() -> HttpProblem:
    return _malformed(f"the body is nested deeper than {_MAX_DEPTH} levels")


def _depth(document: Json) -> int:
    """Return the nesting depth, counted level by level: no recursion for a hostile document to exhaust."""
    depth, level = 0, [document]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) in (dict, list)
        ]
    return depth


def loads(text: bytes) -> Json:
    """Parse JSON without a collection in between: it would go through the document again and again while it grows.

    Other threads do not run meanwhile, since orjson keeps them out. Of several that switch the collector off at once,
    each that found it on switches it on again, so it is in the end as it was.
    """
    if not (_COLLECTS_ON_ALLOCATION and gc.isenabled()):
        return orjson.loads(text)
    gc.disable()
    try:
        return orjson.loads(text)
    finally:
        gc.enable()
