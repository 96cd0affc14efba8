"""The routes, without a web framework: a request in, a response out."""

from __future__ import annotations

from modelserve.http.endpoints import Families, routes_of
from modelserve.http.messages import Request, Response
from modelserve.http.problems import problem_response
from modelserve.http.routes import RouteTable
from modelserve.server import AsyncModelServer


class Api:
    """Answers requests with a started server, on the routes of some families or of all. Every outcome is a response."""

    def __init__(self, server: AsyncModelServer, families: Families = None) -> None:
        self._table = RouteTable(routes_of(server, families))

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            handler, arguments = self._table.find(request.method, request.path)
            return await handler(request, *arguments)
        except Exception as error:  # noqa: BLE001  # the outermost frame: what comes here becomes a response
            return problem_response(error, request.request_id)
