"""``/openapi.json``: OpenAPI 3.1, generated from the signatures of the versions that serve now."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import numpy as np

from modelserve.errors import NotReady
from modelserve.features.layout import MAX_KEY_BYTES
from modelserve.features.plan import FeaturePlan
from modelserve.http.routes import FAMILIES
from modelserve.server import AsyncModelServer
from modelserve.signature import Field, Signature
from modelserve.types import Json

_PROBLEMS: Final = {
    "400": "The body is not JSON",
    "404": "No such model",
    "411": "The web server needs a Content-Length",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "422": "The inputs do not fit the model's signature",
    "500": "The model failed on this input",
    "503": "Not ready, or overloaded (with Retry-After)",
    "504": "Not answered before the deadline",
}


def openapi_document(server: AsyncModelServer, root: str, routes: Collection[str] = FAMILIES) -> Json:
    """Describe every model that serves now, with one typed schema per model, and the fixed routes; those of a mount."""
    schemas: dict[str, Json] = {"Problem": _PROBLEM}
    paths = {path: each for family in FAMILIES if family in routes for path, each in _FIXED.get(family, {}).items()}
    if not server.metrics_enabled:
        paths.pop("/metrics", None)
    for status in server.status():
        try:
            loaded = server.serving_version(status.model_name)
        except NotReady:
            continue
        name = status.model_name
        if "predict" in routes:
            schemas[_component(name)] = (
                inputs_schema(loaded.signature) if loaded.plan is None else request_schema(loaded.plan)
            )
            paths[f"/predict/{name}"] = {"post": _predict(name, loaded.options.queue_limit)}
        if "models" in routes:
            paths[f"/models/{name}"] = {"get": _describe(name)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "modelserve", "version": "1", "description": "Models served by this application."},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


def inputs_schema(signature: Signature) -> Json:
    """Return the JSON Schema of one row."""
    return {
        "type": "object",
        "properties": {field.name: _field_schema(field) for field in signature.inputs},
        "required": [field.name for field in signature.inputs],
        "additionalProperties": False,
    }


def request_schema(plan: FeaturePlan) -> Json:
    """Return the JSON Schema of one row whose features are read by the keys of their entities."""
    fields = {field.name: _field_schema(field) for field in plan.own}
    keys = {entity: fields.get(entity, _KEY) for entity in plan.entities}
    optional = {field.name: _field_schema(field) for field in plan.overridable}
    return {
        "type": "object",
        "properties": keys | fields | optional,
        "required": list(dict.fromkeys((*plan.needed_keys, *fields))),
        "additionalProperties": False,
    }


def _field_schema(field: Field) -> Json:
    schema = _scalar_schema(field)
    if field.nullable:
        schema["type"] = [schema["type"], "null"]
    for size in reversed(field.shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema


def _scalar_schema(field: Field) -> dict[str, Any]:
    if field.dtype == "string":
        return {"type": "string"}
    if field.dtype == "bool":
        return {"type": "boolean"}
    if field.dtype.startswith("float"):
        limit = float(np.finfo(field.dtype).max)
        return {"type": "number", "minimum": -limit, "maximum": limit}
    bounds = np.iinfo(field.dtype)
    return {"type": "integer", "minimum": int(bounds.min), "maximum": int(bounds.max)}


def _predict(name: str, most_rows: int) -> Json:
    row = {"$ref": f"#/components/schemas/{_component(name)}"}
    one = _object({"inputs": row})
    many = _object({"instances": {"type": "array", "items": row, "minItems": 1, "maxItems": most_rows}})
    return {
        "summary": f"Predict with {name}",
        "operationId": f"predict-{name}",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"oneOf": [one, many]}}}},
        "responses": {
            "200": _json_response("The prediction", {"oneOf": [_answer("prediction"), _answer("predictions")]})
        }
        | _problem_responses(*_PROBLEMS),
    }


def _component(model_name: str) -> str:
    """Name a model's schema. Components may not hold a plus: it is escaped, behind a first letter no model has."""
    escaped = "_" + model_name.replace("_", "__").replace("+", "_p") if "+" in model_name else model_name
    return f"{escaped}.inputs"


def _answer(key: str) -> Json:
    several = key == "predictions"
    value: Json = {"type": "array"} if several else {}
    names: Json = {"type": "array", "items": {"type": "string"}}
    answer = _object(
        {
            key: value,
            "model_version": {"type": "string"},
            "latency_ms": {"type": "number", "minimum": 0},
            "request_id": {"type": "string"},
            "cached": {"type": "boolean"},
        }
    )
    answer["properties"]["degraded"] = {"type": "array", "items": names} if several else names
    return answer


def _object(properties: dict[str, Json]) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _get(summary: str, operation: str, *problems: str) -> dict[str, Json]:
    return {
        "summary": summary,
        "operationId": operation,
        "responses": {"200": _json_response(summary, {"type": "object"})} | _problem_responses(*problems),
    }


def _describe(name: str) -> dict[str, Json]:
    parameters = [
        {"name": each, "in": "query", "required": False, "schema": schema, "description": text}
        for each, schema, text in (
            ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, "How many versions to list"),
            ("before", {"type": "string"}, "List those that were registered before this version"),
        )
    ]
    return _get(f"Describe {name}", f"model-{name}", "404", "422") | {"parameters": parameters}


def _json_response(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problem_responses(*codes: str) -> dict[str, Json]:
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {code: {"description": _PROBLEMS[code], "content": content} for code in codes}


_KEY: Final = {
    "type": ["string", "integer"],
    "minLength": 1,
    "maxLength": MAX_KEY_BYTES,
    "minimum": -(2**63),
    "maximum": 2**64 - 1,
    "description": "The key of an entity in the feature store",
}
_READY: Final = {
    "200": _json_response("Every model is ready", {"type": "object"}),
    "503": _json_response("Some model is not ready", {"type": "object"}),
}
_METRICS: Final = {
    "summary": "What is counted, for Prometheus",
    "operationId": "metrics",
    "responses": {
        "200": {
            "description": "Metrics in the text format of Prometheus",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
}
_PROBLEM: Final = {
    "type": "object",
    "description": "RFC 9457 problem details",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "field": {"type": "string"},
        "request_id": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail"],
}
_FIXED: Final[dict[str, dict[str, Json]]] = {
    "models": {"/models": {"get": _get("List the models served here", "models")}},
    "health": {
        "/health/live": {"get": _get("Whether the process is alive", "live")},
        "/health/ready": {"get": _get("Whether every model is ready", "ready") | {"responses": _READY}},
    },
    "metrics": {"/metrics": {"get": _METRICS}},
}
