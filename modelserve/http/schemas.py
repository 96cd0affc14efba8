"""What OpenAPI says of requests and answers: the JSON Schema of a row, from its signature, and of problems."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from modelserve.features.layout import MAX_KEY_BYTES
from modelserve.features.plan import FeaturePlan
from modelserve.serving.version import LoadedVersion
from modelserve.signature import Field, Signature
from modelserve.types import Json

PROBLEMS: Final = {
    "400": "The body is not JSON, or a header cannot be used",
    "404": "No such model",
    "411": "The web server needs a Content-Length",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "422": "The inputs do not fit the model's signature",
    "500": "The model failed on this input",
    "503": "Not ready, or overloaded (with Retry-After)",
    "504": "Not answered before the deadline",
}
"""What each status says. A problem document comes with it."""


# -- rows --------------------------------------------------------------------------------------------------


def row_schema(version: LoadedVersion) -> Json:
    """Return the JSON Schema of one row of a request to a version."""
    return inputs_schema(version.signature) if version.plan is None else request_schema(version.plan)


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


def component_name(model_name: str, part: str) -> str:
    """Name a model's schema. Components may not hold a plus: it is escaped, behind a first letter no model has."""
    escaped = "_" + model_name.replace("_", "__").replace("+", "_p") if "+" in model_name else model_name
    return f"{escaped}.{part}"


_KEY: Final = {
    "type": ["string", "integer"],
    "minLength": 1,
    "maxLength": MAX_KEY_BYTES,
    "minimum": -(2**63),
    "maximum": 2**64 - 1,
    "description": "The key of an entity in the feature store",
}


# -- parts of an operation ---------------------------------------------------------------------------------

_OBJECT: Final = {"type": "object"}


def object_schema(properties: dict[str, Json]) -> dict[str, Any]:
    """Return the schema of an object that has these members, and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def json_answer(description: str, schema: Json = _OBJECT) -> Json:
    """Return what an operation says of one status."""
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def problem_answers(*statuses: str) -> dict[str, Json]:
    """Return what an operation says of statuses that are errors."""
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {status: {"description": PROBLEMS[status], "content": content} for status in statuses}


PROBLEM: Final = {
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
"""The component ``Problem``."""
