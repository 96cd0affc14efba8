"""The description of the API: valid, true to the signatures, and held to by the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import hypothesis
import orjson
import pytest
import schemathesis
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

import modelserve as ms
from modelserve.http.endpoints import routes_of
from modelserve.http.openapi import openapi_document
from modelserve.http.schemas import component_name, inputs_schema
from modelserve.signature import Field, Signature
from tests.http.driver import App, Caller, Messages, Subject, predict, predict_many


@pytest.fixture
def document(call: Caller) -> Any:
    """The description of the models under test, as a client gets it."""
    return call("GET", "/openapi.json").json()


def test_it_is_valid_openapi(document: Any) -> None:
    """The document is OpenAPI 3.1, with models under any name that can be registered."""
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    assert document["openapi"] == "3.1.0"
    assert document["paths"].keys() >= {"/predict/c++_1.0-b", "/models/c++_1.0-b"}


def test_every_operation_has_its_own_name(document: Any) -> None:
    """Generated clients get one function per operation."""
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


def test_names_that_components_cannot_have_do_not_collide(registry: ms.Registry) -> None:
    """A plus is escaped so that no other model's schema can have the same name."""
    names = ["a+b", "a_pb", "a__pb", "_pb", "a+", "a_p", "a_", "+", "a++b", "a_+b", "a+_b", "a-b", "a.b"]
    assert len({component_name(name, "inputs") for name in names}) == len(names)


@pytest.mark.parametrize(
    ("field", "schema"),
    [
        (
            Field("x", "float64"),
            {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
        ),
        (Field("x", "float16"), {"type": "number", "minimum": -65504.0, "maximum": 65504.0}),
        (Field("x", "uint8"), {"type": "integer", "minimum": 0, "maximum": 255}),
        (Field("x", "int64"), {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}),
        (Field("x", "bool"), {"type": "boolean"}),
        (Field("x", "string"), {"type": "string"}),
        (Field("x", "string", nullable=True), {"type": ["string", "null"]}),
        (
            Field("x", "bool", (2, 3)),
            {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": "boolean"}},
            },
        ),
    ],
    ids=str,
)
def test_the_schema_of_a_row(field: Field, schema: Any) -> None:
    """Types, ranges, shapes and nulls are all in the schema, and nothing else is allowed."""
    assert inputs_schema(Signature([field])) == {
        "type": "object",
        "properties": {"x": schema},
        "required": ["x"],
        "additionalProperties": False,
    }


def test_where_it_is_mounted_is_told(server: ms.ModelServer) -> None:
    """Clients find the routes below the mount."""
    for root, url in (("/ml", "/ml"), ("", "/")):
        assert openapi_document(server.core, root, routes_of(server.core))["servers"] == [{"url": url}]


def _resolved(document: Any, schema: Any) -> Any:
    return schema | {"components": document["components"]}


@pytest.mark.parametrize("model_name", ["churn", "trees", "tiles", "c++_1.0-b"])
def test_requests_and_answers_fit_their_schemas(
    call: Caller, document: Any, subjects: dict[str, Subject], model_name: str
) -> None:
    """What the server takes and gives, for one row, several, and a problem, is what the document says."""
    operation = document["paths"][f"/predict/{model_name}"]["post"]
    takes = operation["requestBody"]["content"]["application/json"]["schema"]
    good = dict(subjects[model_name].good)
    right: list[Any] = [{"inputs": good}, {"instances": [good, good]}]
    for body in right:
        OAS31Validator(_resolved(document, takes)).validate(body)
    for body in (
        {"inputs": {}},
        {"instances": []},
        {"instances": [good] * 1025},
        {"inputs": good, "instances": [good]},
    ):
        assert not OAS31Validator(_resolved(document, takes)).is_valid(body)
    answers = [predict(call, model_name, good), predict_many(call, model_name, [good]), predict(call, model_name, {})]
    for answer in answers:
        content = operation["responses"][str(answer.status)]["content"][answer.headers["content-type"]]
        OAS31Validator(_resolved(document, content["schema"])).validate(answer.json())


# -- generated requests ------------------------------------------------------------------------------------


def in_any_loop(server: ms.ModelServer, app: App) -> Callable[..., Awaitable[None]]:
    """Let an app whose server lives in one loop be called from another."""

    async def bridge(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for answer in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{answer}.complete"})
            return
        messages = Messages([await _body(receive)])

        async def connect() -> None:
            await app(scope, messages.receive, messages.send)

        await asyncio.to_thread(server.call, connect())
        for message in messages.sent:
            await send(message)

    return bridge


async def _body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


@pytest.fixture(scope="session")
def api(server: ms.ModelServer) -> Any:
    """The description, read by schemathesis, and the app that it is held to."""
    return schemathesis.openapi.from_asgi("/openapi.json", in_any_loop(server, ms.asgi(server.core)))


PREDICTIONS = [("POST", f"/predict/{name}") for name in ("churn", "trees", "tiles", "c++_1.0-b")]
OTHERS = [
    ("GET", path)
    for path in ("/models", "/models/churn", "/models/c++_1.0-b", "/health/live", "/health/ready", "/metrics")
]


def check_cases(api: Any, method: str, path: str, mode: schemathesis.GenerationMode) -> set[int]:
    """Generate requests for one operation, check every answer as schemathesis does, and return the status codes."""
    seen = set()

    @hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # What fits is decided below: an integer just beyond a float's range is, as JSON's readers have it, within.
        response = case.call_and_validate(excluded_checks=[schemathesis.checks.negative_data_rejection])
        seen.add(response.status_code)
        if method == "POST" and has_good_headers(api.raw_schema, path, case.headers or {}):
            assert (response.status_code == 200) == fits(api.raw_schema, path, response.request.body)

    check()
    return seen


def fits(document: Any, path: str, body: Any) -> bool:
    """Whether a body, its numbers read as the server reads them, fits what the document says of an operation."""
    try:
        sent = orjson.loads(body or b"")
    except orjson.JSONDecodeError:
        return False
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return bool(OAS31Validator(_resolved(document, schema)).is_valid(sent))


def has_good_headers(document: Any, path: str, headers: Mapping[str, str]) -> bool:
    """Whether the headers fit what the document says of them. Some others are taken too, such as keys with accents."""
    (described,) = document["paths"][path]["post"]["parameters"]
    sent = headers.get(described["name"])
    return sent is None or bool(OAS31Validator(described["schema"]).is_valid(sent))


def test_every_operation_is_held_to(api: Any) -> None:
    """The two tests below leave no kind of operation out."""
    described = {(each.ok().method.upper(), each.ok().path) for each in api.get_all_operations()}
    assert described - {*PREDICTIONS, *OTHERS} == {("GET", "/models/trees"), ("GET", "/models/tiles")}


@pytest.mark.parametrize(("method", "path"), [*PREDICTIONS, *OTHERS])
def test_requests_that_fit_the_description_are_answered(api: Any, method: str, path: str) -> None:
    """Whatever the document allows is answered with 200, in the form that it promises."""
    unknown = {404} if path.startswith("/models/") else set()  # a page that begins at a version that there is not
    assert check_cases(api, method, path, schemathesis.GenerationMode.POSITIVE) - unknown == {200}


@pytest.mark.parametrize(("method", "path"), PREDICTIONS)
def test_requests_that_do_not_fit_are_refused(api: Any, method: str, path: str) -> None:
    """Whatever the document does not allow is refused with a problem that it lists."""
    seen = check_cases(api, method, path, schemathesis.GenerationMode.NEGATIVE)
    assert 422 in seen
    assert seen <= {200, 400, 413, 415, 422}
