"""Every route and every way of getting it wrong, through both faces: ASGI and WSGI give the same answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.tree import DecisionTreeClassifier

import modelserve as ms
from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.serving.inference import Inference, PredictRequest
from tests.http import functions
from tests.http.driver import JSON, Answer, Caller, Subject, asgi_caller, call_asgi, call_wsgi, predict, predict_many

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def caller(face: str, server: ms.ModelServer) -> Caller:
    """Return what calls a server through one of its faces."""
    if face == "asgi":
        return asgi_caller(server, ms.asgi(server.core))
    app = ms.wsgi(server)
    return lambda method, path, body=b"", headers=(JSON,): call_wsgi(app, method, path, body, headers)


@pytest.fixture(params=["asgi", "wsgi"])
def face(request: pytest.FixtureRequest) -> str:
    """Each of the two faces."""
    return str(request.param)


@pytest.fixture
def call(face: str, server: ms.ModelServer) -> Caller:
    """Calls the models under test through each face."""
    return caller(face, server)


@pytest.fixture(scope="module")
def odd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ms.ModelServer]:
    """A server of models with odd answers, and of one that is registered and not in production."""
    rows = np.array([[1.0], [2.0]])
    labels = DecisionTreeClassifier().fit(rows, ["basic", "pro"])
    models: dict[str, tuple[Any, Any, str]] = {
        "gaps": (FunctionTransformer(np.absolute), np.array([[1.0], [np.nan]]), "transform"),
        "labels": (labels, rows, "predict"),
        "lossy": (_of(functions.lose_a_row), rows, "transform"),
        "bytes": (_of(functions.answer_bytes), rows, "transform"),
        "slow": (_of(functions.wait_until_released), rows, "transform"),
        "small": (FunctionTransformer(np.absolute), rows, "transform"),
        "staged": (FunctionTransformer(np.absolute), rows, "transform"),
    }
    folder = tmp_path_factory.mktemp("odd")
    with ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        for name, (model, example, method) in models.items():
            trusted = [f"tests.http.functions.{name}" for name in vars(functions) if name.islower()]
            registry.register(name, "1", model, example=example, method=method, trusted=trusted)
            if name != "staged":
                registry.promote(name, "1")
        options = dict.fromkeys(models, ms.ModelOptions(timeout_ms=30_000)) | {
            "slow": ms.ModelOptions(timeout_ms=50, queue_limit=1, max_batch_size=1),
            "small": ms.ModelOptions(timeout_ms=30_000, queue_limit=2),
        }
        with ms.ModelServer(registry, options, cache_dir=folder / "cache", poll_s=3600) as server:
            yield server


def _of(function: Any) -> Any:
    return make_pipeline(FunctionTransformer(function))


# -- predictions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["churn", "trees", "tiles", "c++_1.0-b"])
def test_a_prediction_is_the_bare_models(call: Caller, subjects: dict[str, Subject], model_name: str) -> None:
    """One row in, the model's answer out, with the version that gave it and a fresh id."""
    subject = subjects[model_name]
    answer = predict(call, model_name, subject.good)
    document = answer.json()
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert document.keys() == {"prediction", "model_version", "latency_ms", "request_id", "cached"}
    assert subject.agrees(subject.good, document["prediction"])
    assert (document["model_version"], document["cached"]) == ("1", False)
    assert 0 <= document["latency_ms"] < 5000
    assert UUID7.fullmatch(document["request_id"])
    assert predict(call, model_name, subject.good).json()["request_id"] != document["request_id"]


def test_several_rows_are_answered_in_order_by_one_version(call: Caller) -> None:
    """Instances give predictions, one each, in their order."""
    rows = [{"x": [[i, -i, 0], [0, 0, 1]]} for i in range(5)]
    document = predict_many(call, "tiles", rows).json()
    assert document.keys() == {"predictions", "model_version", "latency_ms", "request_id", "cached"}
    assert document["predictions"] == [[[i, i, 0], [0, 0, 1]] for i in range(5)]


def test_missing_numbers_go_in_and_come_out_as_null(odd_server: ms.ModelServer, face: str) -> None:
    """A prediction of NaN is null: the answer stays JSON."""
    answer = predict_many(caller(face, odd_server), "gaps", [{"x": [None]}, {"x": [-2]}])
    assert answer.json()["predictions"] == [[None], [2.0]]


def test_labels_are_answered_as_strings(odd_server: ms.ModelServer, face: str) -> None:
    """A classifier's own labels are the prediction."""
    answer = predict_many(caller(face, odd_server), "labels", [{"x": [2]}, {"x": [1]}])
    assert answer.json()["predictions"] == ["pro", "basic"]


@pytest.mark.parametrize(
    ("sent", "fit"),
    [
        ("7f3c", True),
        ("a b-c:d/e", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a\tb", False),
        ("a\x00b", False),
        ("caf\xe9", False),
        ("\u202e".encode().decode("latin-1"), False),
        ("\x7f", False),
        ("\x1b[31m", False),
    ],
)
def test_a_request_id_is_repeated_if_it_is_fit_to_be_logged(call: Caller, sent: str, *, fit: bool) -> None:
    """The caller's own id is kept, one that could garble a log is replaced; problems carry one just the same."""
    headers = [JSON, ("x-request-id", sent)]
    document = call("POST", "/predict/tiles", b'{"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}}', headers).json()
    problem = call("POST", "/predict/tiles", b"{}", headers).problem()
    assert (document["request_id"] == sent) == fit
    assert fit or UUID7.fullmatch(document["request_id"])
    assert (problem["request_id"] == sent) == fit
    assert fit or UUID7.fullmatch(problem["request_id"])


def test_a_request_id_is_the_one_of_python(call: Caller) -> None:
    """The header is UTF-8, as the body is."""
    headers = [JSON, ("x-request-id", "é-1".encode().decode("latin-1"))]
    assert call("POST", "/predict/tiles", KEYED, headers).json()["request_id"] == "é-1"


# -- the routing key ---------------------------------------------------------------------------------------

KEYED = b'{"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}}'


@pytest.fixture
def keys(server: ms.ModelServer, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The keys with which the server was asked."""
    seen: list[str | None] = []
    answer = server.core.answer

    async def note(request: PredictRequest) -> Inference:
        seen.append(request.key)
        return await answer(request)

    monkeypatch.setattr(server.core, "answer", note)
    return seen


@pytest.mark.parametrize("key", ["u-17", "x" * 256, "é" * 256, "Jos\xe9 \u2603 \U0001f422"])
def test_a_routing_key_is_the_one_of_python(call: Caller, keys: list[str | None], key: str) -> None:
    """The header is UTF-8: a key is the same text, and so the same version, from either side."""
    sent = key.encode().decode("latin-1")
    assert call("POST", "/predict/tiles", KEYED, [JSON, ("x-routing-key", sent)]).status == 200
    assert call("POST", "/predict/tiles", KEYED).status == 200
    assert keys == [key, None]


@pytest.mark.parametrize("key", ["", "x" * 257, "é" * 257, "a\tb", "a\0b", b"Jos\xe9"])
def test_a_routing_key_that_cannot_be_used_is_refused(call: Caller, keys: list[str | None], key: str | bytes) -> None:
    """The problem names the header: any replacement could be answered by another version."""
    sent = (key.encode() if isinstance(key, str) else key).decode("latin-1")
    answer = call("POST", "/predict/tiles", KEYED, [JSON, ("x-routing-key", sent), ("x-request-id", "mine")])
    problem = answer.problem()
    assert (answer.status, problem["type"]) == (400, "urn:modelserve:problem:invalid-header")
    assert (problem["field"], problem["request_id"], keys) == ("X-Routing-Key", "mine", [])
    assert problem["detail"].startswith("X-Routing-Key: give 1 to 256 printable characters")


# -- bodies that cost more than they weigh -----------------------------------------------------------------


@pytest.mark.parametrize("filling", [b"[]", b"{}"])
def test_a_body_full_of_containers_is_refused_unparsed(call: Caller, filling: bytes) -> None:
    """A body of few bytes but very many lists or objects is a 413 before it can hold up the event loop."""
    body = b'{"inputs": [' + b",".join([filling] * 300_000) + b"]}"
    answer = call("POST", "/predict/tiles", body, [JSON])
    assert answer.status == 413
    assert "more than 4098 lists and objects" in answer.problem()["detail"]
    assert call("POST", "/predict/tiles", b'{"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}}', [JSON]).status == 200


# -- requests that do not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": {}}, "inputs.x"),
        ({"inputs": {"x": 1}}, "inputs.x"),
        ({"inputs": {"y": 1}}, "inputs.x"),
        ({"inputs": {"x": [[1, 2, 3], [4, 5, 6]], "y": 1}}, "inputs.y"),
        ({"instances": None}, "instances"),
        ({"instances": []}, "instances"),
        ({"instances": {"x": 1}}, "instances"),
        ({"instances": "abc"}, "instances"),
        ({"instances": [1]}, "instances[0]"),
        ({"instances": [{"x": [[1, 2, 3], [4, 5, 6]]}, {"x": [[1, 2, 3], [4, 5]]}]}, "instances[1].x"),
        ({"instances": [{"x": [[1, 2, 3], [4, 5, 6]]}] * 1025}, "instances"),
        ({"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}, "instances": []}, "instances"),
        ({"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}, "version": "1"}, "version"),
        ({"input": {}}, "input"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_does_not_fit_is_named(call: Caller, body: Any, field: str) -> None:
    """A 422 says which member, row and input is at fault."""
    answer = call("POST", "/predict/tiles", json.dumps(body).encode())
    problem = answer.problem()
    assert (answer.status, problem["field"]) == (422, field)
    assert problem["detail"].startswith(f"{field}: ")


@pytest.mark.parametrize("body", ["[]", "1", '"inputs"', "null", "true"])
def test_a_body_that_is_no_object_has_no_field_at_fault(call: Caller, body: str) -> None:
    """There is no field to name where there are none."""
    answer = call("POST", "/predict/tiles", body.encode())
    assert answer.status == 422
    assert "field" not in answer.problem()


def test_more_rows_than_the_queue_takes_are_refused(odd_server: ms.ModelServer, face: str) -> None:
    """A request that could never be queued is the caller's to split, and says how many rows go."""
    answer = predict_many(caller(face, odd_server), "small", [{"x": [1.0]}] * 3)
    assert (answer.status, answer.problem()["field"]) == (422, "instances")
    assert "at most 2" in answer.problem()["detail"]
    assert predict_many(caller(face, odd_server), "small", [{"x": [1.0]}] * 2).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", ""),
        ("GET", "/nothing"),
        ("POST", "/predict"),
        ("GET", "/models/nobody"),
        ("GET", "/MODELS"),
        ("GET", "//models"),
        ("GET", "/health"),
        ("GET", "/../models"),
    ],
)
def test_there_is_nothing_elsewhere(call: Caller, method: str, path: str) -> None:
    """Other paths are a 404."""
    answer = call(method, path)
    assert (answer.status, answer.problem()["type"]) == (404, "urn:modelserve:problem:not-found")


@pytest.mark.parametrize(
    "name", ["", "nobody", "tiles//", "tiles ", "TILES", "../tiles", "tiles\0", "é", "a" * 5000, "%"]
)
def test_models_that_are_not_served_are_not_found(call: Caller, name: str) -> None:
    """A name that is not served, down to the last character, is a 404."""
    answer = call("POST", f"/predict/{name}", b'{"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}}')
    assert answer.status == 404
    answer.problem()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/predict/tiles", "POST"),
        ("/predict/nobody", "POST"),
        ("/models", "GET"),
        ("/models/tiles", "GET"),
        ("/health/live", "GET"),
        ("/health/ready", "GET"),
        ("/openapi.json", "GET"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "X"])
def test_other_methods_are_told_the_right_one(call: Caller, method: str, path: str, allowed: str) -> None:
    """A route answers its own method (and HEAD for GET); others get a 405 with Allow."""
    answer = call(method, path, b"{}")
    if method in ({"GET", "HEAD"} if allowed == "GET" else {"POST"}):
        assert answer.status != 405
    else:
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
        assert method == "HEAD" or answer.problem()["detail"] == f"use {allowed}"


@pytest.mark.parametrize(
    "path", ["/models", "/models/tiles", "/health/live", "/health/ready", "/openapi.json", "/nothing"]
)
def test_head_is_get_without_the_body(call: Caller, path: str) -> None:
    """HEAD tells status and length of what GET would send, and sends none of it."""
    head, get = call("HEAD", path), call("GET", path)
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")
    assert int(get.headers["content-length"]) == len(get.body) > 0


# -- models that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["lossy", "bytes"])
def test_an_answer_that_is_none_is_the_models_fault(odd_server: ms.ModelServer, face: str, model_name: str) -> None:
    """Rows lost, and values that have no JSON form, are a failed inference; the next request is answered."""
    call = caller(face, odd_server)
    answer = predict(call, model_name, {"x": [-1.0]})
    assert (answer.status, answer.problem()["type"]) == (500, "urn:modelserve:problem:inference-failed")
    assert predict(call, model_name, {"x": [1.0]}).json()["prediction"] == [1.0]


def test_a_slow_answer_is_a_504_and_a_full_queue_a_503(odd_server: ms.ModelServer) -> None:
    """The deadline holds while the model runs on; who does not fit into the queue is told when to come again."""

    async def crowd() -> list[Answer]:
        app = ms.asgi(odd_server.core)
        body = b'{"inputs": {"x": [1.0]}}'
        return await asyncio.gather(*(call_asgi(app, "POST", "/predict/slow", body) for _ in range(3)))

    functions.RELEASED.clear()
    try:
        answers = odd_server.call(crowd())
    finally:
        functions.RELEASED.set()
    late, *refused = sorted(answers, key=lambda answer: -answer.status)
    assert (late.status, late.problem()["type"]) == (504, "urn:modelserve:problem:deadline-exceeded")
    for answer in refused:
        assert (answer.status, answer.problem()["type"]) == (503, "urn:modelserve:problem:overloaded")
        assert int(answer.headers["retry-after"]) >= 1


# -- models, health, description ---------------------------------------------------------------------------


def test_the_models_are_listed_by_name(call: Caller) -> None:
    """/models says where each model stands."""
    models = call("GET", "/models").json()["models"]
    assert [model["name"] for model in models] == ["c++_1.0-b", "churn", "tiles", "trees"]
    assert models[1] == {
        "name": "churn",
        "state": "ready",
        "production": "1",
        "previous": None,
        "generation": {"wanted": 2, "applied": 2},
        "stale": None,
        "queue_depth": 0,
    }


def test_a_model_is_described(call: Caller) -> None:
    """/models/{name} adds inputs and versions to what the list says."""
    model = call("GET", "/models/churn").json()
    assert call("GET", "/models").json()["models"][1].items() <= model.items()
    assert [(each["name"], each["dtype"], each["nullable"]) for each in model["inputs"]] == [
        ("tenure", "int64", False),
        ("spend", "float64", False),
        ("income", "float64", True),
        ("plan", "string", False),
        ("autopay", "bool", False),
    ]
    (version,) = model["versions"]
    assert version.pop("created_at").endswith("+00:00")
    assert version == {"version": "1", "status": "production", "framework": "sklearn", "metrics": {}}


def test_a_model_is_described_while_the_registry_is_away(
    call: Caller, server: ms.ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the registry the versions are unknown; the rest is still told."""

    def away(*_: Any) -> Any:
        raise BackendUnavailable("the registry's database", functions.SECRET)

    monkeypatch.setattr(server.core.registry, "page", away)
    answer = call("GET", "/models/churn?limit=7")
    assert (answer.status, answer.json()["versions"]) == (200, None)
    assert answer.json()["inputs"] is not None


def test_versions_come_in_pages(face: str, tmp_path: Path) -> None:
    """The newest twenty are shown; ``next`` leads to the ones before them, until there are none."""
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        model, rows = FunctionTransformer(np.absolute), np.array([[1.0], [2.0]])
        first = registry.register("m", "0", model, example=rows, method="transform")
        for i in range(1, 45):
            registry.register("m", str(i), model, example=rows, method="transform", metrics={"n": i})
        registry.promote("m", "44")
        with ms.ModelServer(registry, {"m": ms.ModelOptions()}, cache_dir=tmp_path / "cache", poll_s=3600) as server:
            ask = caller(face, server)

            def call(query: str) -> Any:
                return ask("GET", f"/models/m?{query}").json()

            found, query = [], ""
            while True:
                page = call(query)
                found.append([version["version"] for version in page["versions"]])
                if page["next"] is None:
                    break
                query = f"before={page['next']}"
            assert [len(each) for each in found] == [20, 20, 5]
            assert list(chain.from_iterable(found)) == [str(i) for i in range(44, -1, -1)]
            assert call("limit=2&before=44") == call("before=44&limit=2")
            assert [each["metrics"] for each in call("limit=2&before=44")["versions"]] == [{"n": 43}, {"n": 42}]
            assert call("limit=45")["next"] is None
            assert call("before=0")["versions"] == []
            assert first.created_at.isoformat() == call("before=1")["versions"][0]["created_at"]
            assert call("before=nothing")["status"] == 404
            for limit in ("0", "101", "-1", "1.5", "", "²", "9" * 5000):
                assert (call(f"limit={quote(limit)}")["status"], call(f"limit={quote(limit)}")["field"]) == (
                    422,
                    "limit",
                )


# -- some of the routes ------------------------------------------------------------------------------------

FAMILIES = {
    "predict": ("POST", "/predict/tiles"),
    "models": ("GET", "/models/tiles"),
    "health": ("GET", "/health/ready"),
    "openapi": ("GET", "/openapi.json"),
    "metrics": ("GET", "/metrics"),
}


@pytest.mark.parametrize("routes", ["predict", ["predict", "health"], ("models",), {"openapi", "metrics"}])
def test_a_mount_answers_the_routes_that_it_was_given(server: ms.ModelServer, face: str, routes: Any) -> None:
    """Only the families named are there; the description names no others."""
    if face == "wsgi":
        app = ms.wsgi(server, routes=routes)
        call: Caller = lambda method, path, body=b"", headers=(JSON,): call_wsgi(app, method, path, body, headers)  # noqa: E731  # either of two
    else:
        call = asgi_caller(server, ms.asgi(server.core, routes=routes))
    named = {routes} if isinstance(routes, str) else set(routes)
    body = b'{"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}}'
    for family, (method, path) in FAMILIES.items():
        assert call(method, path, body).status == (200 if family in named else 404), family
    if "openapi" in named:
        assert call("GET", "/openapi.json").json()["paths"].keys() == {"/metrics"}


@pytest.mark.parametrize("routes", ["predictions", ["predict", "/health"], [], "", [None]])
def test_unknown_routes_are_a_wrong_configuration(server: ms.ModelServer, routes: Any) -> None:
    """A family that there is not, or none at all, is refused where the mount is made."""
    for make in (lambda: ms.asgi(server.core, routes=routes), lambda: ms.wsgi(server, routes=routes)):
        with pytest.raises(ConfigError, match=r"routes: expected some of predict, models, health, metrics, openapi"):
            make()


def test_a_model_that_waits_is_listed_without_inputs(odd_server: ms.ModelServer, face: str) -> None:
    """A model that is asked for and not in production yet is known, not ready, and keeps the probe at 503."""
    call = caller(face, odd_server)
    model = call("GET", "/models/staged").json()
    assert (model["state"], model["production"], model["inputs"]) == ("waiting", None, None)
    assert [version["status"] for version in model["versions"]] == ["staging"]
    assert predict(call, "staged", {"x": [1.0]}).problem()["type"] == "urn:modelserve:problem:not-ready"
    ready = call("GET", "/health/ready")
    assert (ready.status, ready.json()["status"], ready.json()["models"]["staged"]) == (503, "not ready", "waiting")
    assert call("GET", "/health/live").status == 200


def test_health(call: Caller) -> None:
    """The process is alive, and every model is ready."""
    assert call("GET", "/health/live").json() == {"status": "alive"}
    ready = call("GET", "/health/ready")
    assert (ready.status, ready.json()["status"]) == (200, "ready")
    assert set(ready.json()["models"].values()) == {"ready"}


def test_the_description_is_served(call: Caller) -> None:
    """/openapi.json names every model's route."""
    answer = call("GET", "/openapi.json")
    assert answer.json()["paths"].keys() >= {"/predict/churn", "/predict/c++_1.0-b", "/models", "/health/ready"}


def test_other_methods_read_no_body(call: Caller) -> None:
    """A body on a GET is of no interest, whatever it is."""
    assert call("GET", "/models", b"\xff" * 1000, [("content-type", "text/plain")]).status == 200
