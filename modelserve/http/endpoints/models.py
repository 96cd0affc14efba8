"""``GET /models`` and ``GET /models/{model}``: what is served here, and where each model stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modelserve.errors import InvalidInput, ModelServeError, NotReady, VersionNotFound
from modelserve.http.messages import Request, Response, json_response
from modelserve.http.routes import Operation, Route
from modelserve.http.schemas import json_answer, problem_answers
from modelserve.server import AsyncModelServer
from modelserve.serving.model_reconciler import ModelStatus
from modelserve.types import Json, PoolStatus

_PAGE: Final = 20
_LARGEST_PAGE: Final = 100


def routes(server: AsyncModelServer) -> tuple[Route, ...]:
    """Return the routes that list and describe models."""
    models = _Models(server)
    return (
        Route("GET", "/models", models.list, _LIST),
        Route("GET", "/models/{model}", models.describe, _DESCRIBE),
    )


class _Models:
    """The handlers of the family."""

    def __init__(self, server: AsyncModelServer) -> None:
        self._server = server

    async def list(self, _: Request) -> Response:
        return json_response({"models": [_summary(status) for status in self._server.status()]})

    async def describe(self, request: Request, model_name: str) -> Response:
        status = self._server.status_of(model_name)
        limit, before = _page_of(request.query)
        return json_response(
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


def _page_of(query: Mapping[str, str]) -> tuple[int, str | None]:
    """Return which versions are asked for: how many, and before which. Raises ``InvalidInput``."""
    limit = query.get("limit", str(_PAGE))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= len(str(_LARGEST_PAGE))):
        limit = "0"
    if not 1 <= int(limit) <= _LARGEST_PAGE:
        raise InvalidInput("limit", f"expected a whole number from 1 to {_LARGEST_PAGE}")
    return int(limit), query.get("before")


def _summary(status: ModelStatus) -> dict[str, Json]:
    return {
        "name": status.model_name,
        "state": state_of(status),
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


def state_of(status: ModelStatus) -> str:
    """Return a model's state in one word: reasons name paths and hosts, and stay in the log."""
    if status.ready:
        return "ready"
    return "loading" if status.loading else "failed" if status.target and status.problem else "waiting"


_LIST: Final = Operation(
    "models",
    "List the models served here",
    {"200": json_answer("List the models served here")},
)
_DESCRIBE: Final = Operation(
    "model-{model}",
    "Describe {model}",
    {"200": json_answer("The model")} | problem_answers("404", "422"),
    parameters=(
        {
            "name": "limit",
            "in": "query",
            "required": False,
            "schema": {"type": "integer", "minimum": 1, "maximum": _LARGEST_PAGE, "default": _PAGE},
            "description": "How many versions to list",
        },
        {
            "name": "before",
            "in": "query",
            "required": False,
            "schema": {"type": "string"},
            "description": "List those that were registered before this version",
        },
    ),
)
