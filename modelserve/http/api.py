"""The routes, without a web framework: a request in, a response out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import orjson

from modelserve.errors import InferenceFailed, InvalidInput, ModelNotFound, ModelServeError, NotReady
from modelserve.http.messages import Request, Response
from modelserve.http.openapi import openapi_document
from modelserve.http.problems import HttpProblem, problem_response
from modelserve.keeper import ModelStatus
from modelserve.monitor.exposition import CONTENT_TYPE as METRICS_TYPE
from modelserve.server import Answer, AsyncModelServer
from modelserve.types import Json, ModelVersion, PoolStatus

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
_MAX_DEPTH: Final = 64
_MAX_CONTAINERS: Final = 250_000
_MAX_REQUEST_ID: Final = 128
_ENCODE: Final = orjson.OPT_SERIALIZE_NUMPY


class Api:
    """Answers requests with a started server. Every outcome is a response; nothing is raised."""

    def __init__(self, server: AsyncModelServer) -> None:
        self._server = server
        self._fixed: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/models": ("GET", self._models),
            "/health/live": ("GET", self._alive),
            "/health/ready": ("GET", self._ready),
            "/openapi.json": ("GET", self._openapi),
            "/metrics": ("GET", self._metrics),
        }

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        request_id = request.request_id or self._server.new_request_id()
        try:
            path = request.path
            if path.startswith("/predict/"):
                return await self._predict(request, path[9:], request_id)
            if path.startswith("/models/"):
                return await self._model(request, path[8:])
            method, handler = self._fixed.get(path, ("", _nothing_here))
            if method:
                _require_method(request, method)
            return await handler(request)
        except Exception as error:  # noqa: BLE001  # the outermost frame: what comes here becomes a response
            return problem_response(error, request_id)

    # -- predictions ---------------------------------------------------------------------------------------

    async def _predict(self, request: Request, model_name: str, request_id: str) -> Response:
        _require_method(request, "POST")
        body = _json_body(request)
        if len(body) != 1:
            raise _misshapen(body)
        if "inputs" in body:
            answer = await self._server.answer(model_name, (body["inputs"],), "inputs", request_id)
            return _prediction("prediction", answer[0][0], answer, answer[5][0] if answer[5] else ())
        if "instances" in body:
            rows = body["instances"]
            if not isinstance(rows, list) or not rows:
                raise InvalidInput("instances", "expected a list of at least one row")
            answer = await self._server.answer(model_name, rows, "instances[{}]", request_id)
            return _prediction("predictions", answer[0], answer, answer[5])
        raise _misshapen(body)

    # -- models --------------------------------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        return _answer({"models": [_summary(status) for status in self._server.status()]})

    async def _model(self, request: Request, model_name: str) -> Response:
        _require_method(request, "GET")
        status = next((each for each in self._server.status() if each.model_name == model_name), None)
        if status is None:
            raise ModelNotFound(model_name)
        return _answer(
            _summary(status)
            | {
                "pool": None if status.pool is None else _pool(status.pool),
                "inputs": self._inputs(model_name),
                "versions": await self._versions(model_name),
            }
            | self._features(model_name)
        )

    def _inputs(self, model_name: str) -> Json:
        try:
            return self._server.loaded(model_name).signature.to_json()["inputs"]
        except NotReady:
            return None

    def _features(self, model_name: str) -> dict[str, Json]:
        """Say which inputs a request does not give, and by which key each is read; nothing for most models."""
        try:
            plan = self._server.loaded(model_name).plan
        except NotReady:
            return {}
        return {} if plan is None else {"features": plan.keys_of_features}

    async def _versions(self, model_name: str) -> Json:
        """List what the registry has; null while it cannot be asked, since serving goes on without it."""
        try:
            return [_version(each) for each in await self._server.versions(model_name)]
        except ModelServeError:
            return None

    # -- health and description ----------------------------------------------------------------------------

    async def _alive(self, _: Request) -> Response:
        return _answer({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        ready = self._server.ready
        served = self._server.status()
        body: dict[str, Json] = {
            "status": "ready" if ready else "not ready",
            "models": {status.model_name: _state(status) for status in served},
        }
        stale = {status.model_name: status.stale.isoformat() for status in served if status.stale is not None}
        if stale:
            body["stale"] = stale
        return _answer(body, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        figures = await self._server.metrics()
        return await _nothing_here(request) if figures is None else Response(200, figures, METRICS_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return _answer(openapi_document(self._server, request.root))


async def _nothing_here(_: Request) -> Response:
    raise HttpProblem(404, "not-found", "there is nothing here")


def _require_method(request: Request, method: str) -> None:
    if request.method != method:
        raise HttpProblem(405, "method-not-allowed", f"use {method}", allow=method)


def _json_body(request: Request) -> dict[str, Json]:
    media = request.content_type.partition(";")[0].strip().lower()
    if media and media != "application/json" and not media.endswith("+json"):
        raise HttpProblem(415, "unsupported-media-type", "send the body as application/json", accept="application/json")
    nested = request.body.count(b"[") + request.body.count(b"{")
    if nested > _MAX_CONTAINERS:
        # Each costs a hundred times its two bytes, on the event loop: seconds for a body that is full of them.
        problem = f"the body holds {nested} lists and objects; at most {_MAX_CONTAINERS} are read"
        raise HttpProblem(413, "content-too-large", problem)
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:
        raise HttpProblem(400, "malformed-json", f"the body is not JSON: {error}") from None
    if type(body) is not dict:
        raise InvalidInput("", "the body must be an object with 'inputs' or 'instances'")
    if nested > _MAX_DEPTH and _depth(body) > _MAX_DEPTH:
        raise HttpProblem(400, "malformed-json", f"the body is nested deeper than {_MAX_DEPTH} levels")
    return body


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


def _misshapen(body: dict[str, Json]) -> InvalidInput:
    unknown = next((name for name in body if name not in ("inputs", "instances")), None)
    if unknown is not None:
        return InvalidInput(unknown[:256], "unknown member; the body takes 'inputs' (one row) or 'instances' (several)")
    if body:
        return InvalidInput("instances", "give either 'inputs' (one row) or 'instances' (several), not both")
    return InvalidInput("inputs", "missing; give 'inputs' (one row) or 'instances' (several)")


def _prediction(key: str, value: Json, answer: Answer, degraded: Sequence[Any]) -> Response:
    _, version, latency_ms, request_id, cached, _ = answer
    document = {key: value, "model_version": version, "latency_ms": latency_ms, "request_id": request_id}
    document["cached"] = len(cached) > 0 and all(cached)
    if degraded:
        document["degraded"] = degraded
    return _answer(document)


def _answer(document: dict[str, Any], status: int = 200) -> Response:
    try:
        return Response(status, orjson.dumps(document, option=_ENCODE))
    except TypeError as error:
        raise InferenceFailed(f"the model's answer has no JSON form: {error}") from error


def clean_request_id(value: str) -> str | None:
    """Return the caller's request id if it is fit to be logged and repeated."""
    fit = 0 < len(value) <= _MAX_REQUEST_ID and value.isascii() and value.isprintable()
    return value if fit else None


def _summary(status: ModelStatus) -> dict[str, Json]:
    return {
        "name": status.model_name,
        "state": _state(status),
        "production": status.production,
        "previous": status.previous,
        "generation": {"wanted": status.wanted, "applied": status.applied},
        "stale": None if status.stale is None else status.stale.isoformat(),
        "queue_depth": status.queue_depth,
    }


def _pool(pool: PoolStatus) -> dict[str, Json]:
    """Show a pool, without what only its host should know, such as process ids."""
    batches = pool.batches
    known = batches.fixed_s is not None and batches.per_row_s is not None
    return {
        "replicas": [{"state": each.state, "restarts": each.restarts} for each in pool.replicas],
        "smallest": pool.smallest,
        "largest": pool.largest,
        "restarts": pool.restarts,
        "scaled": {"out": pool.scaled_out, "in": pool.scaled_in},
        "circuit_open": pool.circuit_open,
        "batches": {
            "count": batches.batches,
            "in_place": sum(each.detail.get("in_place", 0) for each in pool.replicas),
            "sizes": {str(rows): count for rows, count in batches.sizes.items()},
            "reasons": batches.reasons,
            "max_rows": batches.max_rows,
        },
        "refused": batches.refused,
        "quarantined": batches.quarantined,
        "service_time": {"fixed_s": batches.fixed_s, "per_row_s": batches.per_row_s} if known else None,
    }


def _state(status: ModelStatus) -> str:
    """Say where a model stands in one word: reasons name paths and hosts, and stay in the log."""
    if status.ready:
        return "ready"
    return "loading" if status.loading else "failed" if status.target and status.problem else "waiting"


def _version(version: ModelVersion) -> dict[str, Json]:
    return {
        "version": version.version,
        "status": version.status,
        "framework": version.framework,
        "metrics": version.metrics,
        "created_at": version.created_at.isoformat(),
    }
