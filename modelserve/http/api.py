"""The routes, without a web framework: a request in, a response out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl

import orjson

from modelserve.errors import InferenceFailed, InvalidInput, ModelServeError, NotReady, VersionNotFound
from modelserve.http import body as bodies
from modelserve.http.messages import Request, Response
from modelserve.http.openapi import openapi_document
from modelserve.http.problems import HttpProblem, problem_response
from modelserve.http.routes import Routes, chosen
from modelserve.monitor.metrics.exposition import CONTENT_TYPE as METRICS_TYPE
from modelserve.server import AsyncModelServer
from modelserve.serving.inference import Inference, PredictRequest
from modelserve.serving.model_reconciler import ModelStatus
from modelserve.signature import Pieces
from modelserve.types import Json, PoolStatus

_MAX_REQUEST_ID: Final = 128
_PAGE: Final = 20
_LARGEST_PAGE: Final = 100
_ENCODE: Final = orjson.OPT_SERIALIZE_NUMPY


class Api:
    """Answers requests with a started server, on some of the routes or on all. Every outcome is a response."""

    def __init__(self, server: AsyncModelServer, routes: Routes = None) -> None:
        self._server = server
        self._routes = chosen(routes)
        self._predicts, self._describes = "predict" in self._routes, "models" in self._routes
        fixed: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {
            "models": {"/models": self._models},
            "health": {"/health/live": self._alive, "/health/ready": self._ready},
            "openapi": {"/openapi.json": self._openapi},
            "metrics": {"/metrics": self._metrics},
        }
        self._fixed = {path: each for family in self._routes for path, each in fixed.get(family, {}).items()}

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        request_id = request.request_id or self._server.new_request_id()
        try:
            path = request.path.removesuffix("/")  # some routers add one
            if path.startswith("/predict/") and self._predicts:
                return await self._predict(request, path[9:], request_id)
            if path.startswith("/models/") and self._describes:
                return await self._model(request, path[8:])
            return await self._fixed.get(path, _nothing_here)(request)
        except Exception as error:  # noqa: BLE001  # the outermost frame: what comes here becomes a response
            return problem_response(error, request_id)

    # -- predictions ---------------------------------------------------------------------------------------

    async def _predict(self, request: Request, model_name: str, request_id: str) -> Response:
        _require_method(request, "POST")
        target = self._server.serving_version(model_name)  # before the body costs anything
        bodies.require_json(request)
        if len(request.body) <= bodies.AT_ONCE:
            return await self._predicted(model_name, bodies.parsed(request.body), request_id)
        async with bodies.read_in_turns(request.body, target) as document:
            return await self._predicted(model_name, document, request_id, is_large=True)

    async def _predicted(
        self, model_name: str, body: dict[str, Any], request_id: str, *, is_large: bool = False
    ) -> Response:
        if len(body) != 1:
            raise _misshapen(body)
        if "inputs" in body:
            row = [body["inputs"]]
            rows = Pieces(row) if is_large else row
            answer = await self._server.answer(PredictRequest(model_name, rows, "inputs", request_id=request_id))
            return _prediction("prediction", answer.values[0], answer, answer.degraded[0] if answer.degraded else ())
        if "instances" in body:
            rows = body["instances"]
            if not isinstance(rows, list | Pieces) or not rows:
                raise InvalidInput("instances", "expected a list of at least one row")
            rows = Pieces(rows) if is_large and isinstance(rows, list) else rows
            answer = await self._server.answer(PredictRequest(model_name, rows, "instances[{}]", request_id=request_id))
            return _prediction("predictions", answer.values, answer, answer.degraded)
        raise _misshapen(body)

    # -- models --------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        _require_method(request, "GET")
        return _answer({"models": [_summary(status) for status in self._server.status()]})

    async def _model(self, request: Request, model_name: str) -> Response:
        _require_method(request, "GET")
        status = self._server.status_of(model_name)
        limit, before = _page_of(request.query)
        return _answer(
            _summary(status)
            | {
                "pool": None if status.pool is None else _pool(status.pool),
                "warnings": status.warnings,
                "inputs": self._inputs(model_name),
            }
            | await self._versions(model_name, limit, before)
            | self._features(model_name)
        )

    def _inputs(self, model_name: str) -> Json:
        try:
            return self._server.serving_version(model_name).signature.to_json()["inputs"]
        except NotReady:
            return None

    def _features(self, model_name: str) -> dict[str, Json]:
        """Say which inputs a request does not give, and by which key each is read; nothing for most models."""
        try:
            plan = self._server.serving_version(model_name).plan
        except NotReady:
            return {}
        return {} if plan is None else {"features": plan.keys_of_features}

    async def _versions(self, model_name: str, limit: int, before: str | None) -> dict[str, Json]:
        """List what the registry has; null while it cannot be asked, since serving goes on without it."""
        try:
            page = await self._server.page(model_name, limit, before)
        except VersionNotFound:
            raise
        except ModelServeError:
            return {"versions": None, "next": None}
        return {"versions": [each._asdict() for each in page.versions], "next": page.next}

    # -- health and description ----------------------------------------------------------------------------

    async def _alive(self, request: Request) -> Response:
        _require_method(request, "GET")
        return _answer({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        _require_method(request, "GET")
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
        _require_method(request, "GET")
        figures = await self._server.metrics()
        return await _nothing_here(request) if figures is None else Response(200, figures, METRICS_TYPE)

    async def _openapi(self, request: Request) -> Response:
        _require_method(request, "GET")
        return _answer(openapi_document(self._server, request.root, self._routes))


async def _nothing_here(_: Request) -> Response:
    raise HttpProblem(404, "not-found", "there is nothing here")


def _page_of(query: bytes) -> tuple[int, str | None]:
    """Return which versions are asked for: how many, and before which. Raises ``InvalidInput``."""
    found = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    limit = found.get("limit", str(_PAGE))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= len(str(_LARGEST_PAGE))):
        limit = "0"
    if not 1 <= int(limit) <= _LARGEST_PAGE:
        raise InvalidInput("limit", f"expected a whole number from 1 to {_LARGEST_PAGE}")
    return int(limit), found.get("before")


def _require_method(request: Request, method: str) -> None:
    if request.method != method:
        raise HttpProblem(405, "method-not-allowed", f"use {method}", allow=method)


def _misshapen(body: dict[str, Json]) -> InvalidInput:
    unknown = next((name for name in body if name not in ("inputs", "instances")), None)
    if unknown is not None:
        return InvalidInput(unknown[:256], "unknown member; the body takes 'inputs' (one row) or 'instances' (several)")
    if body:
        return InvalidInput("instances", "give either 'inputs' (one row) or 'instances' (several), not both")
    return InvalidInput("inputs", "missing; give 'inputs' (one row) or 'instances' (several)")


def _prediction(key: str, value: Json, answer: Inference, degraded: Sequence[Any]) -> Response:
    document = {
        key: value,
        "model_version": answer.version.meta.version,
        "latency_ms": answer.latency_ms,
        "request_id": answer.request_id,
        "cached": answer.is_cached,
    }
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
