"""``GET /metrics``: the counters of this process, or of all that share a folder, for Prometheus."""

from __future__ import annotations

from typing import Final

from modelserve.http.messages import Request, Response
from modelserve.http.routes import Operation, Route
from modelserve.monitor.metrics.exposition import CONTENT_TYPE
from modelserve.server import AsyncModelServer


def routes(server: AsyncModelServer) -> tuple[Route, ...]:
    """Return the route of the metrics; none where they are off."""

    async def expose(_: Request) -> Response:
        return Response(200, await server.metrics() or b"", CONTENT_TYPE)

    return (Route("GET", "/metrics", expose, _EXPOSE),) if server.metrics_enabled else ()


_EXPOSE: Final = Operation(
    "metrics",
    "What is counted, for Prometheus",
    {
        "200": {
            "description": "Metrics in the text format of Prometheus",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
