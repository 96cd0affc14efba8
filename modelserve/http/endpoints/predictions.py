"""``POST /predict/{model}``: one row (``inputs``) or several (``instances``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from modelserve.errors import InferenceFailed, InvalidInput
from modelserve.http import body as bodies
from modelserve.http.messages import Request, Response, json_response, text_of
from modelserve.http.problems import HttpProblem
from modelserve.http.routes import Body, Operation, Route
from modelserve.http.schemas import (
    PROBLEMS,
    component_name,
    json_answer,
    object_schema,
    problem_answers,
    row_schema,
)
from modelserve.ids import ROUTING_KEY_RULE, is_routing_key
from modelserve.server import AsyncModelServer
from modelserve.serving.inference import Inference, PredictRequest
from modelserve.serving.version import LoadedVersion
from modelserve.signature import Pieces
from modelserve.types import Json

_ONE: Final = "inputs"
_SEVERAL: Final = "instances[{}]"


def routes(server: AsyncModelServer) -> tuple[Route, ...]:
    """Return the route of the predictions."""
    return (Route("POST", "/predict/{model}", _Predictions(server).predict, _PREDICT),)


class _Predictions:
    """The handler of the family."""

    def __init__(self, server: AsyncModelServer) -> None:
        self._server = server

    async def predict(self, request: Request, model_name: str) -> Response:
        version = self._server.serving_version(model_name)  # before the body costs anything
        bodies.require_json(request)
        key = _routing_key_in(request.headers)
        if len(request.body) <= bodies.AT_ONCE:
            rows, prefix = _rows_in(bodies.parsed(request.body))
            return await self._answer(PredictRequest(model_name, rows, prefix, None, key, request.request_id))
        async with bodies.read_in_turns(request.body, version) as document:
            rows, prefix = _rows_in(document)
            rows = Pieces(rows) if type(rows) is list else rows  # they are examined in turns as well
            return await self._answer(PredictRequest(model_name, rows, prefix, None, key, request.request_id))

    async def _answer(self, request: PredictRequest) -> Response:
        inference = await self._server.answer(request)
        try:
            return json_response(_document(inference, is_one=request.prefix == _ONE))
        except TypeError as error:
            raise InferenceFailed(f"the model's answer has no JSON form: {error}") from error


def _routing_key_in(headers: Mapping[str, str]) -> str | None:
    """Return the key as Python hosts have it. Raises the problem for one that cannot be used.

    It is not replaced, as a request id is: another key could be another version.
    """
    sent = headers.get("x-routing-key")
    if sent is None:
        return None
    key = text_of(sent)
    if not is_routing_key(key):
        detail = f"X-Routing-Key: {ROUTING_KEY_RULE}, as UTF-8, or leave it out"
        raise HttpProblem(400, "invalid-header", detail, field="X-Routing-Key")
    return key


def _rows_in(body: dict[str, Any]) -> tuple[list[Any] | Pieces, str]:
    """Return the rows of a body, and how an error names one of them. Raises ``InvalidInput``."""
    if len(body) == 1:
        if "inputs" in body:
            return [body["inputs"]], _ONE
        if "instances" in body:
            rows = body["instances"]
            if not isinstance(rows, list | Pieces) or not rows:
                raise InvalidInput("instances", "expected a list of at least one row")
            return rows, _SEVERAL
    raise _misshapen(body)


def _misshapen(body: dict[str, Json]) -> InvalidInput:
    unknown = next((name for name in body if name not in ("inputs", "instances")), None)
    if unknown is not None:
        return InvalidInput(unknown[:256], "unknown member; the body takes 'inputs' (one row) or 'instances' (several)")
    if body:
        return InvalidInput("instances", "give either 'inputs' (one row) or 'instances' (several), not both")
    return InvalidInput("inputs", "missing; give 'inputs' (one row) or 'instances' (several)")


def _document(inference: Inference, *, is_one: bool) -> dict[str, Any]:
    degraded: Sequence[Any] = inference.degraded
    if is_one and degraded:
        degraded = degraded[0]
    document: dict[str, Any] = {
        "prediction" if is_one else "predictions": inference.values[0] if is_one else inference.values,
        "model_version": inference.version.meta.version,
        "latency_ms": inference.latency_ms,
        "request_id": inference.request_id,
        "cached": inference.is_cached,
    }
    if degraded:
        document["degraded"] = degraded
    return document


# -- as OpenAPI has it -------------------------------------------------------------------------------------


def _body(model_name: str, version: LoadedVersion) -> Body:
    name = component_name(model_name, "inputs")
    row = {"$ref": f"#/components/schemas/{name}"}
    several = {"type": "array", "items": row, "minItems": 1, "maxItems": version.options.queue_limit}
    schema = {"oneOf": [object_schema({"inputs": row}), object_schema({"instances": several})]}
    return Body(schema, {name: row_schema(version)})


def _answer_schema(name: str, value: Json, degraded: Json) -> dict[str, Any]:
    schema = object_schema(
        {
            name: value,
            "model_version": {"type": "string"},
            "latency_ms": {"type": "number", "minimum": 0},
            "request_id": {"type": "string"},
            "cached": {"type": "boolean"},
        }
    )
    schema["properties"]["degraded"] = degraded
    return schema


_NAMES: Final = {"type": "array", "items": {"type": "string"}}
_ANSWER: Final = {
    "oneOf": [
        _answer_schema("prediction", {}, _NAMES),
        _answer_schema("predictions", {"type": "array"}, {"type": "array", "items": _NAMES}),
    ]
}
_ROUTING_KEY: Final = {
    "name": "X-Routing-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[!-~]+$"},
    "description": "The unit that a canary keeps on one version, such as a user's id",
}
_PREDICT: Final = Operation(
    "predict-{model}",
    "Predict with {model}",
    {"200": json_answer("The prediction", _ANSWER)} | problem_answers(*PROBLEMS),
    parameters=(_ROUTING_KEY,),
    body=_body,
)
