"""Large bodies: counted before they are parsed, parsed in steps, and no more costly than what the signature allows."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import modelserve as ms
from modelserve.http import body as bodies
from modelserve.http.scan import WINDOW
from tests.http import functions
from tests.http.driver import Answer, Caller, asgi_caller, call_asgi, call_wsgi

PICTURE = (512, 512, 3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ms.ModelServer]:
    """A server of a model of pictures, one of texts, one of many numbers, and one that is not in production."""
    folder = tmp_path_factory.mktemp("large")
    inputs = {
        "pictures": ms.Field("x", "uint8", PICTURE),
        "texts": ms.Field("x", "string"),
        "numbers": ms.Field("x", "float64", (40,)),
        "staged": ms.Field("x", "string"),
    }
    with ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        for name, field in inputs.items():
            model = make_pipeline(FunctionTransformer(functions.measure))
            signature, trusted = ms.Signature([field]), ["tests.http.functions.measure"]
            registry.register(name, "1", model, signature=signature, method="transform", trusted=trusted)
            if name != "staged":
                registry.promote(name, "1")
        options = dict.fromkeys(inputs, ms.ModelOptions(timeout_ms=60_000, slo_ms=60_000))
        with ms.ModelServer(registry, options, cache_dir=folder / "cache", poll_s=3600, log=False) as server:
            yield server


@pytest.fixture(params=["asgi", "wsgi"])
def call(request: pytest.FixtureRequest, server: ms.ModelServer) -> Caller:
    """Calls the models through each face."""
    if request.param == "asgi":
        return asgi_caller(server, ms.asgi(server.core))
    app = ms.wsgi(server)
    return lambda method, path, body=b"", headers=(): call_wsgi(app, method, path, body, headers)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what was parsed, large or of very many containers."""
    lengths: list[int] = []
    loads = bodies.loads

    def noted(text: bytes) -> Any:
        lengths.append(len(text))
        return loads(text)

    monkeypatch.setattr(bodies, "loads", noted)
    return lengths


def test_a_picture_is_answered(call: Caller, parsed: list[int]) -> None:
    """A lawful request of 262,660 lists is answered, and parsed in small slices."""
    picture = np.random.default_rng(3).integers(0, 256, PICTURE)
    answer = call("POST", "/predict/pictures", orjson.dumps({"inputs": {"x": picture.tolist()}}))
    assert answer.status == 200, answer.body
    assert answer.json()["prediction"] == [float(picture.sum())]
    assert max(parsed) < 2 * WINDOW + 200


def test_a_text_of_brackets_is_answered(call: Caller) -> None:
    """Brackets, commas and quotes inside of strings are counted as what they are: text."""
    text = '[{,"\\' * 100_000
    answer = call("POST", "/predict/texts", orjson.dumps({"instances": [{"x": text}, {"x": "é"}]}))
    assert answer.json()["predictions"] == [[float(len(text))], [1.0]]


def test_a_batch_is_answered_in_order(call: Caller) -> None:
    """Rows that lie across the slices come back in their order, each with its own answer."""
    rows = np.random.default_rng(4).normal(size=(1024, 40))
    rows[:, 0] = np.arange(1024)
    answer = call("POST", "/predict/numbers", orjson.dumps({"instances": [{"x": row} for row in rows.tolist()]}))
    assert np.allclose(np.ravel(answer.json()["predictions"]), rows.sum(axis=1))


def test_the_row_at_fault_is_named(call: Caller) -> None:
    """In a large body too, the row and the input at fault are named."""
    rows: list[dict[str, Any]] = [{"x": list(range(40))} for _ in range(1000)]
    rows[700]["x"] = list(range(39))
    answer = call("POST", "/predict/numbers", orjson.dumps({"instances": rows}))
    assert (answer.status, answer.problem()["field"]) == (422, "instances[700].x")


@pytest.mark.parametrize(
    ("model_name", "body", "what"),
    [
        ("texts", b'{"instances": [%b]}' % b",".join([b"[]"] * 250_000), "lists and objects"),
        ("texts", b'{"instances": [%b]}' % b",".join([b"1"] * 250_000), "values"),
        ("texts", b'{"inputs": [%b]}' % b",".join([b'"a"'] * 250_000), "values"),
        ("numbers", b'{"inputs": {%b}}' % b",".join([b'"%d":"a"' % i for i in range(20_000)]), "strings"),
        ("pictures", b'{"instances": [%b]}' % b",".join([b"[]"] * 600_000), "lists and objects"),
    ],
)
def test_more_than_a_request_can_hold_is_refused_unparsed(
    call: Caller, parsed: list[int], model_name: str, body: bytes, what: str
) -> None:
    """What no request to this model can hold is a 413 that says how much one can."""
    answer = call("POST", f"/predict/{model_name}", body)
    assert (answer.status, answer.problem()["type"]) == (413, "urn:modelserve:problem:content-too-large")
    assert what in answer.problem()["detail"]
    assert parsed == []


@pytest.mark.parametrize(("model_name", "status"), [("nobody", 404), ("staged", 503)])
@pytest.mark.parametrize("body", [b"[" * 300_000, b"\xff", b"[]" * 1000])
def test_a_body_for_no_model_costs_nothing(
    call: Caller, parsed: list[int], model_name: str, status: int, body: bytes
) -> None:
    """The name comes first: a body for a model that is not there or not loaded is not looked at."""
    assert call("POST", f"/predict/{model_name}", body).status == status
    assert parsed == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"inputs": {"x": "%b"}' % (b"a" * 200_000), 400),
        (b'{"inputs": {"x": "%b}}' % (b"a" * 200_000), 400),
        (b'{"inputs": {"x": "a"}}' + b" " * 200_000 + b"]", 400),
        (b'{"inputs": {"x": "a"}},' + b" " * 200_000, 400),
        (b"[" * 200_000, 400),
        (b'["%b"]' % (b"a" * 200_000), 422),
        (b'{"inputs": {"x": "%b", "x": "b"}}' % (b"a" * 200_000), 200),
        (b'{"inputs": {"x": "\\ud800%b"}}' % (b"a" * 200_000), 400),
        (b'{"inputs": {"x": NaN}}' + b" " * 200_000, 400),
    ],
    ids=["unclosed", "open string", "more", "a comma", "deep", "no object", "twice", "surrogate", "NaN"],
)
def test_large_bodies_are_refused_as_small_ones_are(call: Caller, body: bytes, status: int) -> None:
    """What makes a small body malformed, or not fit, makes a large one so."""
    assert call("POST", "/predict/texts", body).status == status


def test_others_have_their_turn_meanwhile(server: ms.ModelServer) -> None:
    """While one large body is read and validated, the loop turns as often as it has slices, and more."""

    async def turns(body: bytes) -> tuple[Answer, int]:
        asked = asyncio.ensure_future(call_asgi(ms.asgi(server.core), "POST", "/predict/pictures", body))
        count = 0
        while not asked.done():
            await asyncio.sleep(0)
            count += 1
        return await asked, count

    body = orjson.dumps({"inputs": {"x": np.full(PICTURE, 7).tolist()}})
    answer, count = server.call(turns(body))
    assert answer.status == 200
    assert count > 2 * len(body) // WINDOW + np.prod(PICTURE) // (1 << 17)


# -- the garbage collector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_left_as_it_was(*, is_enabled: bool) -> None:
    """After a parse, good or bad, the host's collector runs if it ran before."""
    before = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        assert bodies.loads(b"[1]") == [1]
        with pytest.raises(orjson.JSONDecodeError):
            bodies.loads(b"[1")
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_nothing_is_collected_while_a_text_is_parsed() -> None:
    """A text of very many lists is parsed without a collection."""
    text, collections = b"[%b]" % b",".join([b"[]"] * 20_000), []

    def noted(phase: str, _: object) -> None:
        collections.append(phase)

    document: Any = None
    gc.collect()
    gc.callbacks.append(noted)
    try:
        document = bodies.loads(text)
        seen = list(collections)
    finally:
        gc.callbacks.remove(noted)
    assert len(document) == 20_000
    assert len(seen) <= 2  # at most the one that was due, once it was parsed


def test_threads_that_parse_at_once_leave_the_collector_running() -> None:
    """Two servers in two threads may parse at the same time."""
    text = b"[%b]" % b",".join([b"[]"] * 1000)
    threads = [threading.Thread(target=lambda: [bodies.loads(text) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
