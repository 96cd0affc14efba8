"""``GET /openapi.json``: what the routes of a mount take and answer."""

from __future__ import annotations

from collections.abc import Sequence

from modelserve.http.messages import Request, Response, json_response
from modelserve.http.openapi import openapi_document
from modelserve.http.routes import Route
from modelserve.server import AsyncModelServer


def routes(server: AsyncModelServer, described: Sequence[Route]) -> tuple[Route, ...]:
    """Return the route of the document, which describes the other routes of a mount."""

    async def describe(request: Request) -> Response:
        return json_response(openapi_document(server, request.root, described))

    return (Route("GET", "/openapi.json", describe),)
