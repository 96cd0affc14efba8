"""What a client learns of an error: what it can act on, and nothing of the inside."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import FunctionTransformer

import modelserve as ms
from modelserve import errors
from modelserve.http.api import Api
from modelserve.http.messages import Request, Response
from modelserve.http.problems import HttpProblem, problem_response
from tests.http import functions
from tests.http.driver import Answer, Caller, Subject, asgi_caller, call_wsgi, predict, predict_many, secrets_in

SECRET = functions.SECRET


def answer_to(error: Exception, request_id: str | None = None) -> Answer:
    """Return the response to an error as a client gets it."""
    response = problem_response(error, request_id)
    headers = {
        "content-type": response.content_type,
        "content-length": str(len(response.body)),
        **dict(response.headers),
    }
    return Answer(response.status, headers, response.body)


# -- every error there is ----------------------------------------------------------------------------------

FOR_THE_CLIENT: list[tuple[Exception, int, str, str]] = [
    (errors.InvalidInput("x", "expected int64"), 422, "invalid-input", "x: expected int64"),
    (errors.ModelNotFound("churn"), 404, "not-found", "no model named 'churn'"),
    (errors.VersionNotFound("churn", "2"), 404, "not-found", "model 'churn' has no version '2'"),
    (errors.VersionNotFound("churn", None), 404, "not-found", "model 'churn' has no production version"),
    (errors.JobNotFound("7"), 404, "not-found", "no batch job '7'"),
    (errors.InvalidTransition("churn", "2", "it is archived"), 409, "conflict", "churn 2: it is archived"),
    (errors.NotRunning("closing"), 503, "not-ready", "the server is closing"),
    (errors.Overloaded("the queue is full", 0.5), 503, "overloaded", "the queue is full; try again in 0.5 s"),
    (errors.DeadlineExceeded(0.2), 504, "deadline-exceeded", "not answered within 200 ms"),
    (HttpProblem(418, "teapot", "short and stout"), 418, "teapot", "short and stout"),
]
SECRET_ONES: list[tuple[Exception, int, str]] = [
    (errors.NotReady(SECRET), 503, "not-ready"),
    (errors.BackendUnavailable("postgresql://admin:password@db", SECRET), 503, "unavailable"),
    (errors.Unavailable(SECRET), 503, "unavailable"),
    (errors.InferenceFailed(SECRET), 500, "inference-failed"),
    (errors.OutOfMemory(SECRET), 500, "inference-failed"),
    (errors.WorkerDied(SECRET), 500, "worker-died"),
    (errors.LoadFailed(SECRET), 500, "internal-error"),
    (errors.TooLittleMemory(SECRET), 500, "internal-error"),
    (errors.ArtifactUnsafe(SECRET), 500, "internal-error"),
    (errors.ArtifactCorrupt(SECRET, SECRET, SECRET), 500, "internal-error"),
    (errors.ConfigError(SECRET), 500, "internal-error"),
    (errors.MissingDependency("torch", "torch"), 500, "internal-error"),
    (errors.ForkedServer(1, 2), 500, "internal-error"),
    (errors.LeaseLost(SECRET, 3), 500, "internal-error"),
    (errors.ModelServeError(SECRET), 500, "internal-error"),
    (errors.ExecutionError(SECRET), 500, "internal-error"),
    (RuntimeError(SECRET), 500, "internal-error"),
    (FileNotFoundError(2, "No such file", "/secret/models"), 500, "internal-error"),
    (KeyError(SECRET), 500, "internal-error"),
    (RecursionError(SECRET), 500, "internal-error"),
    (MemoryError(), 500, "internal-error"),
]


def kind_of(error: Any) -> str:
    return type(error).__name__ if isinstance(error, Exception) else str(error)


@pytest.mark.parametrize(("error", "status", "kind", "detail"), FOR_THE_CLIENT)
def test_what_the_client_can_act_on_is_told(error: Exception, status: int, kind: str, detail: str) -> None:
    """Errors about the request itself keep their words."""
    answer = answer_to(error, "7f3c")
    problem = answer.json()
    assert (answer.status, problem["status"]) == (status, status)
    assert problem["type"] == f"urn:modelserve:problem:{kind}"
    assert problem["title"] == kind.replace("-", " ")
    assert (problem["detail"], problem["request_id"]) == (detail, "7f3c")
    assert not secrets_in(answer.body)


@pytest.mark.parametrize(("error", "status", "kind"), SECRET_ONES, ids=kind_of)
def test_what_is_inside_stays_inside(error: Exception, status: int, kind: str) -> None:
    """Errors of ours keep their status, and their words to themselves."""
    problem = answer_to(error).problem()
    assert (problem["status"], problem["type"]) == (status, f"urn:modelserve:problem:{kind}")
    assert "request_id" not in problem


def test_every_error_of_ours_was_thought_of() -> None:
    """Whoever adds an error decides here what a client learns of it."""
    every = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.ModelServeError)}
    seen = {type(error) for error, *_ in (*FOR_THE_CLIENT, *SECRET_ONES)}
    abstract = {errors.NotFound, errors.Conflict, errors.LoadError, errors.VersionExists, errors.SchemaOutdated}
    assert every - seen == abstract


def test_no_time_to_try_again_where_waiting_does_not_help() -> None:
    """``Retry-After`` is absent then, and the sentence says what to change."""
    answer = answer_to(errors.Overloaded("the model takes about 1.5 s for this alone, and timeout_ms leaves 1 s", None))
    assert (answer.status, "retry-after" in answer.headers) == (503, False)
    assert "timeout_ms" in answer.problem()["detail"]


def test_what_derives_from_an_error_is_treated_like_it() -> None:
    """A host's or an adapter's own error has the status of the nearest one that is known."""

    class CacheDown(errors.BackendUnavailable):
        pass

    assert answer_to(CacheDown("redis", SECRET)).problem()["type"] == "urn:modelserve:problem:unavailable"


@pytest.mark.parametrize(("wait_s", "told"), [(0.01, "1"), (1.0, "1"), (1.2, "2"), (75.0, "75")])
def test_retry_after_is_in_whole_seconds(wait_s: float, told: str) -> None:
    """The header takes no fractions: never told to come too early."""
    assert answer_to(errors.Overloaded("full", wait_s)).headers["retry-after"] == told


def test_headers_of_a_problem_have_dashes() -> None:
    """A keyword becomes the header it stands for."""
    assert answer_to(HttpProblem(401, "who", "tell", www_authenticate="Basic")).headers["www-authenticate"] == "Basic"


def test_a_name_that_no_document_can_hold_is_told_as_well_as_it_can_be() -> None:
    """Lone surrogates, which in-process callers can pass, do not break the answer."""
    response: Response = problem_response(errors.InvalidInput("a\ud800b", "unknown"), None)
    assert json.loads(response.body)["field"] == "a?b"


def test_only_what_was_not_the_clients_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A 500 is logged once, with its traceback under the request's id; a client's mistake is not."""
    for error in (*(each[0] for each in FOR_THE_CLIENT), *(each[0] for each in SECRET_ONES[:3])):
        problem_response(error, "7f3c")
    assert caplog.records == []
    problem_response(RuntimeError(SECRET), "7f3c")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("modelserve", logging.ERROR)
    assert "7f3c" in record.getMessage()
    assert SECRET in caplog.text


# -- through the faces -------------------------------------------------------------------------------------


@pytest.fixture
def picky(tmp_path: Path) -> Iterator[ms.ModelServer]:
    """A server of a model that fails below zero, with a message full of secrets."""
    rows = np.array([[1.0], [2.0]])
    model = FunctionTransformer(functions.fail_below_zero)
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        trusted = ["tests.http.functions.fail_below_zero"]
        registry.register("picky", "1", model, example=rows, method="transform", trusted=trusted)
        registry.promote("picky", "1")
        options = {"picky": ms.ModelOptions(timeout_ms=30_000)}
        with ms.ModelServer(registry, options, cache_dir=tmp_path / "cache", poll_s=3600) as server:
            yield server


def test_a_model_that_raises(picky: ms.ModelServer, caplog: pytest.LogCaptureFixture) -> None:
    """The client learns that the model failed, the log learns why, and other rows are answered."""
    call = asgi_caller(picky, ms.asgi(picky.core))
    for answer in (predict(call, "picky", {"x": [-1]}), predict_many(call, "picky", [{"x": [1]}, {"x": [-1]}])):
        assert answer.status == 500
        assert answer.problem()["detail"] == "the model failed on this input"
    assert "password" in caplog.text
    assert predict(call, "picky", {"x": [1]}).json()["prediction"] == [1.0]


def test_a_time_limit_that_the_model_cannot_keep(tmp_path: Path) -> None:
    """Both errors name the option and what the model takes, advise no waiting, and the model's page says it too."""
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        model, trusted = FunctionTransformer(functions.take_long), ["tests.http.functions.take_long"]
        registry.register("slow", "1", model, example=np.array([[1.0]]), method="transform", trusted=trusted)
        registry.promote("slow", "1")
        options = {"slow": ms.ModelOptions(timeout_ms=10)}
        with ms.ModelServer(registry, options, cache_dir=tmp_path / "cache", log=False) as server:
            answer = predict(asgi_caller(server, ms.asgi(server.core)), "slow", {"x": [1]})
            shown = asgi_caller(server, ms.asgi(server.core))("GET", "/models/slow").json()
            (status,) = server.status()
    assert (answer.status, "retry-after" in answer.headers) == (504, False)
    said = r"not answered within 10 ms: the model takes about 0\.0[3-9]\d* s for this alone; raise timeout_ms"
    assert re.fullmatch(said, answer.problem()["detail"])
    assert shown["warnings"] == list(status.warnings)
    assert shown["warnings"][0].startswith("timeout_ms=10 is less than the 0.0")


def test_a_version_that_was_refused(picky: ms.ModelServer, tmp_path: Path) -> None:
    """With no version that loads, routes say so without saying where it lies or why."""
    registry = picky.core.registry
    blob = tmp_path / "artifacts" / registry.get("picky", "1").artifact.key
    blob.chmod(0o600)
    blob.write_bytes(b"damaged" * 100)
    with ms.ModelServer(registry, cache_dir=tmp_path / "other cache", poll_s=3600) as server:
        call = asgi_caller(server, ms.asgi(server.core))
        assert str(tmp_path) in str(server.status()) or "SHA-256" in str(server.status())
        answer = predict(call, "picky", {"x": [1]})
        assert (answer.status, answer.problem()["type"]) == (503, "urn:modelserve:problem:not-ready")
        ready = call("GET", "/health/ready")
        assert (ready.status, ready.json()) == (503, {"status": "not ready", "models": {"picky": "failed"}})
        for path in ("/models", "/models/picky", "/health/live", "/openapi.json"):
            answer = call("GET", path)
            assert answer.status == 200
            assert not secrets_in(answer.body)
        assert "/predict/picky" not in call("GET", "/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError(SECRET), 500), (errors.BackendUnavailable("redis", SECRET), 503)]
)
@pytest.mark.parametrize("face", ["asgi", "wsgi"])
def test_an_unexpected_error_anywhere(
    server: ms.ModelServer,
    subjects: dict[str, Subject],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    face: str,
) -> None:
    """Whatever breaks behind a route becomes a problem without a word about the cause."""

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    app = ms.wsgi(server)
    call: Caller = asgi_caller(server, ms.asgi(server.core)) if face == "asgi" else _through(app)
    with monkeypatch.context() as patched:
        patched.setattr(server.core, "answer", broken)
        patched.setattr(server.core, "status", broken)
        for method, path in (("POST", "/predict/tiles"), *(("GET", each) for each in ("/models", "/health/ready"))):
            answer = call(method, path, b'{"inputs": {}}')
            assert answer.status == status
            answer.problem()
    subjects["tiles"].check_serves(call)


def _through(app: Any) -> Caller:
    return lambda method, path, body=b"", headers=(): call_wsgi(app, method, path, body, headers)


def test_a_server_that_does_not_run(registry: ms.Registry, tmp_path: Path) -> None:
    """Before the start and after the end, a problem says so; for as long the process is alive and not ready."""
    core = ms.AsyncModelServer(registry, {"tiles": ms.ModelOptions()}, cache_dir=tmp_path / "cache")

    def ask(method: str, path: str) -> Answer:
        response = asyncio.run(Api(core)(Request(method, path, b'{"inputs": {"x": []}}', {}, "r")))
        return Answer(
            response.status,
            {"content-length": str(len(response.body)), "content-type": response.content_type},
            response.body,
        )

    for said in ("the server was not started: enter it", "the server was closed"):
        problem = ask("POST", "/predict/tiles").problem()
        assert (problem["status"], problem["type"]) == (503, "urn:modelserve:problem:not-ready")
        assert problem["detail"].startswith(said)
        assert [ask("GET", path).status for path in ("/health/ready", "/health/live", "/openapi.json")] == [
            503,
            200,
            200,
        ]
        assert ask("GET", "/models").json() == {"models": []}
        asyncio.run(_start_and_close(core))


async def _start_and_close(core: ms.AsyncModelServer) -> None:
    async with core:
        assert core.ready
