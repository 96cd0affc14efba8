"""Features over HTTP: what a request gives, what an answer says, and how it is described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from sklearn.preprocessing import FunctionTransformer

import modelserve as ms
from tests.http.driver import Caller, asgi_caller, predict, predict_many

PATIENT_MS = 10_000.0
DECLARED = (
    ms.Features("user_id", ["spend"], defaults={"spend": 0.0}, budget_ms=PATIENT_MS),
    ms.Features("item_id", ["price"], budget_ms=PATIENT_MS),
    ms.Features("shop_id", ["tax"], defaults={"tax": 0.5}, overridable=True, budget_ms=PATIENT_MS),
)
REQUEST = {"x": 1.0, "user_id": 1, "item_id": "a", "shop_id": 9}


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A server whose model ``sum`` adds three features to what a request gives."""
    folder = tmp_path_factory.mktemp("features")
    frame = pd.DataFrame({"x": [1.0, 2.0], "spend": [1.0, 2.0], "price": [1.0, 2.0], "tax": [1.0, 2.0]})
    writer = ms.FeatureWriter("memory://")
    writer.put("user_id", 1, {"spend": 10.0})
    writer.put("item_id", "a", {"price": 100.0})
    writer.put("shop_id", 9, {"tax": 1000.0})
    options = {"sum": ms.ModelOptions(features=DECLARED, timeout_ms=30_000)}
    with ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        adder = FunctionTransformer(np.sum, kw_args={"axis": 1})
        registry.register("sum", "1", adder, example=frame, method="transform", trusted=["numpy.sum"])
        registry.promote("sum", "1")
        with ms.ModelServer(
            registry, options, cache_dir=folder / "cache", poll_s=3600, features=writer.store
        ) as server:
            yield asgi_caller(server, ms.asgi(server.core))


def test_a_request_names_keys_and_gets_an_answer(face: Caller) -> None:
    """An answer in which nothing is degraded says nothing of it."""
    answer = predict(face, "sum", REQUEST).json()
    assert answer["prediction"] == 1111.0
    assert "degraded" not in answer


def test_a_degraded_answer_names_the_features(face: Caller) -> None:
    """A default in place of a feature shows in the answer, row by row where there are several."""
    unknown = REQUEST | {"user_id": 2}
    answer = predict(face, "sum", unknown).json()
    assert (answer["prediction"], answer["degraded"]) == (1101.0, ["spend"])
    both = predict_many(face, "sum", [REQUEST, unknown | {"shop_id": 8}]).json()
    assert (both["predictions"], both["degraded"]) == ([1111.0, 101.5], [[], ["spend", "tax"]])


def test_what_is_given_wins_where_that_is_allowed(face: Caller) -> None:
    """A feature that a request may give needs no key; any other is refused by its name."""
    given = {"x": 1.0, "user_id": 1, "item_id": "a", "tax": 2.0}
    assert predict(face, "sum", given).json()["prediction"] == 113.0
    refused = predict(face, "sum", REQUEST | {"spend": 1.0})
    assert refused.status == 422
    assert refused.problem()["field"] == "inputs.spend"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"x": 1.0, "item_id": "a", "shop_id": 9}, "inputs.user_id"),
        (REQUEST | {"user_id": None}, "inputs.user_id"),
        (REQUEST | {"user_id": [1]}, "inputs.user_id"),
        (REQUEST | {"item_id": "nobody"}, "inputs.item_id"),
        (REQUEST | {"x": "one"}, "inputs.x"),
        (REQUEST | {"colour": 1}, "inputs.colour"),
    ],
)
def test_what_does_not_fit_is_a_422(face: Caller, request_: Any, field: str) -> None:
    """A key that is wrong, or has none of a feature that is needed, is told by its place."""
    refused = predict(face, "sum", request_)
    assert refused.status == 422
    assert refused.problem()["field"] == field


def test_the_description_has_keys_and_not_features(face: Caller) -> None:
    """OpenAPI shows what a request gives: keys, own inputs, and what it may give; the server holds to it."""
    document = face("GET", "/openapi.json").json()
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    schema = document["components"]["schemas"]["sum.inputs"]
    assert list(schema["properties"]) == ["user_id", "item_id", "shop_id", "x", "tax"]
    assert schema["required"] == ["user_id", "item_id", "x"]
    fits = OAS31Validator(schema).is_valid
    assert fits(REQUEST)
    assert fits({"x": 1.0, "user_id": 1, "item_id": "a", "tax": 2.0})
    assert not fits(REQUEST | {"spend": 1.0})
    assert not fits(REQUEST | {"user_id": None})
    assert not fits(REQUEST | {"user_id": ""})
    (answer, answers) = document["paths"]["/predict/sum"]["post"]["responses"]["200"]["content"]["application/json"][
        "schema"
    ]["oneOf"]
    for request, declared in ((REQUEST | {"user_id": 2}, answer), (REQUEST, answer)):
        OAS31Validator(declared).validate(predict(face, "sum", request).json())
    OAS31Validator(answers).validate(predict_many(face, "sum", [REQUEST, REQUEST | {"user_id": 2}]).json())


def test_the_description_of_a_model_says_what_is_read(face: Caller) -> None:
    """Each feature is listed with the key that it is read by."""
    assert face("GET", "/models/sum").json()["features"] == {"spend": "user_id", "price": "item_id", "tax": "shop_id"}
