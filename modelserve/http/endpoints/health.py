"""``GET /health/live`` and ``GET /health/ready``: the probes of an orchestrator."""

from __future__ import annotations

from typing import Final

from modelserve.http.endpoints.models import state_of
from modelserve.http.messages import Request, Response, json_response
from modelserve.http.routes import Operation, Route
from modelserve.http.schemas import json_answer
from modelserve.server import AsyncModelServer
from modelserve.types import Json


def routes(server: AsyncModelServer) -> tuple[Route, ...]:
    """Return the routes of the probes."""

    async def ready(_: Request) -> Response:
        return _readiness(server)

    return (Route("GET", "/health/live", _live, _LIVE), Route("GET", "/health/ready", ready, _READY))


async def _live(_: Request) -> Response:
    return json_response({"status": "alive"})


def _readiness(server: AsyncModelServer) -> Response:
    ready, served = server.ready, server.status()
    body: dict[str, Json] = {
        "status": "ready" if ready else "not ready",
        "models": {status.model_name: state_of(status) for status in served},
    }
    stale = {status.model_name: status.stale.isoformat() for status in served if status.stale is not None}
    if stale:
        body["stale"] = stale
    return json_response(body, 200 if ready else 503)


_LIVE: Final = Operation("live", "Whether the process is alive", {"200": json_answer("Whether the process is alive")})
_READY: Final = Operation(
    "ready",
    "Whether every model is ready",
    {
        "200": json_answer("Every model is ready"),
        "503": json_answer("Some model is not ready"),
    },
)
