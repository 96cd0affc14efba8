"""Whatever is sent to a model, the answer is a problem that says what is wrong, or the bare model's own.

Every test ends with good requests to all models: nothing that was sent may have hurt the server.
"""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import modelserve as ms
from modelserve.errors import InvalidInput
from modelserve.signature import Signature
from tests.http.driver import (
    JSON,
    Answer,
    Caller,
    Headers,
    Subject,
    connection,
    head_of,
    predict,
    read_answer,
    socket_caller,
    uvicorn_serving,
)

LIMIT = 200_000
NAMES = ("churn", "trees", "tiles")

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
models = st.sampled_from(NAMES)


@pytest.fixture(autouse=True)
def still_serving(call: Caller, subjects: dict[str, Subject]) -> Iterator[None]:
    """After each test, every model answers a good request right."""
    yield
    for subject in subjects.values():
        subject.check_serves(call)


def send(call: Caller, model_name: str, body: bytes, headers: Headers = (JSON,)) -> Answer:
    """Post a body to a model."""
    return call("POST", f"/predict/{model_name}", body, headers)


def check(answer: Answer, subject: Subject, body: bytes) -> None:
    """Check that a body was answered with a client's problem, or as the bare model answers it."""
    if answer.status != 200:
        assert 400 <= answer.status < 500, answer.body
        assert (answer.status == 422) == (answer.problem(body)["type"] == "urn:modelserve:problem:invalid-input")
        return
    document, sent = answer.json(), json.loads(body)
    rows, predictions = (
        ([sent["inputs"]], [document["prediction"]])
        if "inputs" in sent
        else (sent["instances"], document["predictions"])
    )
    assert len(rows) == len(predictions)
    for row, prediction in zip(rows, predictions, strict=True):
        assert subject.agrees(row, prediction), (row, prediction)


# -- bodies of any kind ------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=4),
    max_leaves=12,
)
edges: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, "", "1", "NaN", "a\0b", "🐢", [], {}, [[]], [None], {"x": 1}),
        *(0, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**300, 10**400),
        *(-0.0, 0.5, 1.0, 5e-324, 3.5e38, -1e300, 1.7976931348623157e308),
    ]
)


@thorough
@given(model_name=models, body=st.binary(max_size=200))
@example(model_name="churn", body=b"")
@example(model_name="churn", body=b"\x00")
@example(model_name="churn", body=b"\xef\xbb\xbf{}")
@example(model_name="churn", body="{}".encode("utf-16"))
@example(model_name="churn", body=b'{"inputs": \xff\xfe}')
@example(model_name="churn", body=b'{"inputs": "\xed\xa0\x80"}')
def test_any_bytes(call: Caller, subjects: dict[str, Subject], model_name: str, body: bytes) -> None:
    """A body of arbitrary bytes is refused as malformed, or as what it is if it happens to be JSON."""
    check(send(call, model_name, body), subjects[model_name], body)


@thorough
@given(model_name=models, document=json_values)
def test_any_document(call: Caller, subjects: dict[str, Subject], model_name: str, document: Any) -> None:
    """A body of arbitrary JSON is refused."""
    body = json.dumps(document).encode()
    check(send(call, model_name, body), subjects[model_name], body)


@thorough
@given(model_name=models, member=st.sampled_from(["inputs", "instances"]), value=json_values | edges)
def test_anything_as_inputs(
    call: Caller, subjects: dict[str, Subject], model_name: str, member: str, value: Any
) -> None:
    """Arbitrary JSON in place of the inputs or of the instances is refused, and that place is named."""
    body = json.dumps({member: value}).encode()
    answer = send(call, model_name, body)
    check(answer, subjects[model_name], body)
    if answer.status == 422:
        assert answer.problem(body)["field"].startswith(member)


# -- near misses -------------------------------------------------------------------------------------------


@st.composite
def near_misses(draw: st.DrawFn, good: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Change one thing in a good request; return it with the name of the input that was changed."""
    request = copy.deepcopy(good)
    name = draw(st.sampled_from(sorted(request)))
    kind = draw(st.sampled_from(["element", "value", "value", "remove", "rename", "add", "longer"]))
    value = draw(edges | json_values)
    if kind == "value" or (kind == "element" and not isinstance(request[name], list)):
        request[name] = value
    elif kind == "element":
        _change_element(draw, request[name], value)
    elif kind == "longer":
        request[name] = [*request[name], value] if isinstance(request[name], list) else [request[name]]
    elif kind == "add":
        name = draw(st.text(min_size=1, max_size=9).filter(lambda text: text not in good))
        request[name] = value
    else:
        gone = request.pop(name)
        if kind == "rename":
            request[name.upper()] = gone
    return request, name


def _change_element(draw: st.DrawFn, tensor: list[Any], value: Any) -> None:
    while isinstance(tensor[0], list) and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, len(tensor) - 1))]
    index = draw(st.integers(0, len(tensor) - 1))
    if draw(st.booleans()):
        tensor[index] = value
    else:
        del tensor[index]


def fits(server: ms.ModelServer, model_name: str, request: dict[str, Any]) -> bool:
    """Whether the model's signature takes a request, its numbers read as the server reads them."""
    signature = Signature.from_json(server.core.serving_version(model_name).signature.to_json())
    try:
        signature.validate(orjson.loads(json.dumps(request)))
    except (InvalidInput, orjson.JSONDecodeError):
        return False
    return True


@settings(thorough, max_examples=400)
@given(data=st.data(), model_name=models)
def test_one_thing_wrong(
    server: ms.ModelServer, call: Caller, subjects: dict[str, Subject], data: st.DataObject, model_name: str
) -> None:
    """A good request with one thing changed is answered right if it still fits; else the input at fault is named."""
    subject = subjects[model_name]
    request, name = data.draw(near_misses(dict(subject.good)))
    body = json.dumps({"inputs": request}).encode()
    answer = send(call, model_name, body)
    check(answer, subject, body)
    assert (answer.status == 200) == fits(server, model_name, request)
    if answer.status == 422:
        assert name in answer.problem(body)["field"]


@thorough
@given(data=st.data(), model_name=models, rows=st.integers(1, 5))
def test_one_row_wrong(
    call: Caller, subjects: dict[str, Subject], data: st.DataObject, model_name: str, rows: int
) -> None:
    """Among several rows, the one at fault is named with its number; or all are answered right."""
    subject = subjects[model_name]
    at = data.draw(st.integers(0, rows - 1))
    instances = [dict(subject.good) for _ in range(rows)]
    instances[at], name = data.draw(near_misses(dict(subject.good)))
    body = json.dumps({"instances": instances}).encode()
    answer = send(call, model_name, body)
    check(answer, subject, body)
    if answer.status == 422:
        assert answer.problem(body)["field"] == f"instances[{at}].{name}"


# -- JSON that is written in an odd way --------------------------------------------------------------------

GOOD_TEXT = b'{"inputs": {"x": [0.5, -1.5, 2, 0.25]}}'


@thorough
@given(data=st.data())
def test_a_damaged_text(call: Caller, subjects: dict[str, Subject], data: st.DataObject) -> None:
    """A good body cut short, with bytes changed, doubled or put in, is refused or answered for what it then says."""
    start = data.draw(st.integers(0, len(GOOD_TEXT)))
    stop = data.draw(st.integers(start, min(len(GOOD_TEXT), start + 6)))
    put_in = data.draw(st.binary(max_size=4) | st.sampled_from([b"[", b"]", b"{", b"}", b",", b"9", b"e9", b'"x":1,']))
    body = GOOD_TEXT[:start] + put_in + GOOD_TEXT[stop:]
    answer = send(call, "trees", body)
    if answer.status == 200:
        assert subjects["trees"].agrees(json.loads(body)["inputs"], answer.json()["prediction"])
    else:
        assert answer.status in {400, 422}
        answer.problem(body)


@pytest.mark.parametrize(
    "number",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "nan",
        "0x10",
        "01",
        "1.",
        ".5",
        "+1",
        "1e",
        "--1",
        "1_0",
        "'1'",
    ],
)
def test_numbers_that_are_not_json(call: Caller, number: str) -> None:
    """What no JSON number looks like, or is too large to be one, makes the body malformed."""
    answer = send(call, "trees", b'{"inputs": {"x": [0, 0, 0, %s]}}' % number.encode())
    assert answer.status == 400
    assert answer.problem()["type"].endswith(":malformed-json")


@pytest.mark.parametrize("number", ["-0.0", "-0", "1E2", "1e-400", "340282346638528859811704183484516925440", "0e999"])
def test_odd_numbers_that_are_json(call: Caller, subjects: dict[str, Subject], number: str) -> None:
    """Odd but proper numbers are what they say."""
    body = b'{"inputs": {"x": [0, 0, 0, %s]}}' % number.encode()
    answer = send(call, "trees", body)
    assert answer.status == 200
    check(answer, subjects["trees"], body)


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_huge_integers(call: Caller, digits: int) -> None:
    """An integer beyond every type is refused, in the field that it stands in or as no number at all."""
    for model_name, inputs in (("trees", '{"x": [0, 0, 0, %s]}'), ("tiles", '{"x": [[0, 0, 0], [0, 0, %s]]}')):
        answer = send(call, model_name, f'{{"inputs": {inputs % ("9" * digits)}}}'.encode())
        assert (answer.status == 200) == (digits == 20)
    tenure = '{"tenure": %s, "spend": 1, "income": 1, "plan": "a", "autopay": true}' % ("9" * digits)
    answer = send(call, "churn", f'{{"inputs": {tenure}}}'.encode())
    assert answer.status in {400, 422}
    assert answer.problem().get("field", "tenure").endswith("tenure")


def test_lone_surrogates(call: Caller) -> None:
    """Half a surrogate pair is no text: as a value, as a name, and as a member."""
    for body in (
        rb'{"inputs": {"tenure": 1, "spend": 1, "income": 1, "plan": "\ud800", "autopay": true}}',
        rb'{"inputs": {"\udfff": 1}}',
        rb'{"\ud800": 1}',
    ):
        answer = send(call, "churn", body)
        assert answer.status in {400, 422}
        answer.problem()


def test_a_key_that_comes_twice(call: Caller, subjects: dict[str, Subject]) -> None:
    """Of equal keys the last one counts, as in every JSON reader at hand, and it is validated."""
    twice = b'{"inputs": {"x": "no"}, "inputs": {"x": [9, 9, 9, 9], "x": [0.5, -1.5, 2, 0.25]}}'
    check(send(call, "trees", twice), subjects["trees"], twice)
    assert send(call, "trees", twice).status == 200
    assert send(call, "trees", b'{"inputs": {"x": [0.5, -1.5, 2, 0.25], "x": 1}}').problem()["field"] == "inputs.x"


@pytest.mark.parametrize("depth", [2, 60, 65, 100, 900, 10_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"x":', "}")])
@pytest.mark.parametrize("place", ["%s", '{"inputs": %s}', '{"inputs": {"x": %s}}', '{"instances": [%s]}', '{"y": %s}'])
def test_deep_nesting(call: Caller, depth: int, opening: str, closing: str, place: str) -> None:
    """Nesting of any depth is refused without being followed down."""
    whole = place % (opening * depth + "0" + closing * depth)
    for body in (whole, whole[: len(whole) // 2]):
        assert send(call, "tiles", body.encode()).status in {400, 422}


def test_wide_bodies(call: Caller) -> None:
    """Many rows, many names, a long string, a long list: refused by a limit or by the signature, never by a crash."""
    wide: list[Any] = [
        {"instances": [{"x": [1, 2, 3, 4]}] * 20_000},
        {"instances": [1] * 500_000},
        {"inputs": {str(i): i for i in range(50_000)}},
        {"inputs": {"x": [0] * 500_000}},
        {"inputs": {"x": "a" * 2_000_000}},
        {"a" * 1_000_000: 1},
    ]
    for document in wide:
        answer = send(call, "trees", json.dumps(document).encode())
        assert answer.status in {413, 422}
        assert len(answer.body) < 2_000
        answer.problem()


# -- content types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx", "*/*",
     "application/octet-stream", "text/json", "json", ";", "\xff/\xfe", "application/xml; charset=application/json"],
)  # fmt: skip
def test_other_content_types(call: Caller, content_type: str) -> None:
    """A body that does not claim to be JSON is not read as JSON."""
    answer = send(call, "trees", GOOD_TEXT, [("content-type", content_type)])
    assert answer.status == (415 if content_type != ";" else 200)
    assert answer.headers.get("accept", "application/json") == "application/json"


@pytest.mark.parametrize(
    "headers",
    [(), (("content-type", ""),), (JSON,), (("content-type", "Application/JSON ; charset=UTF-8"),),
     (("content-type", "application/vnd.api+json"),)],
)  # fmt: skip
def test_content_types_that_are_json(call: Caller, headers: Headers) -> None:
    """JSON by any of its names, or a body that says nothing of itself, is read."""
    assert send(call, "trees", GOOD_TEXT, headers).status == 200


@thorough
@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from(["content-type", "content-length", "x-request-id", "accept", "host"]),
            st.text(st.characters(max_codepoint=255), max_size=40) | st.just("9" * 5000) | st.just("-1"),
        ),
        max_size=4,
    )
)
def test_any_headers(call: Caller, headers: list[tuple[str, str]]) -> None:
    """Headers of any content are refused or make no difference."""
    answer = send(call, "trees", GOOD_TEXT, headers)
    assert answer.status in {200, 413, 415}
    answer.json()


# -- over a socket -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["h11", "httptools"])
def address(
    request: pytest.FixtureRequest,
    registry: ms.Registry,
    options: dict[str, ms.ModelOptions],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, int]]:
    """The address of a uvicorn with each of its parsers, whose app starts and stops a server of its own."""
    cache = tmp_path_factory.mktemp("cache")
    app = ms.asgi(ms.AsyncModelServer(registry, options, cache_dir=cache, poll_s=3600), max_body_bytes=LIMIT)
    with uvicorn_serving(app, http=request.param) as address:
        yield address


@pytest.fixture
def quiet(address: tuple[str, int], subjects: dict[str, Subject], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After the test, the server over the socket answers right, and has logged no error."""
    yield
    for subject in subjects.values():
        subject.check_serves(socket_caller(address))
    assert [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}] == []


@pytest.mark.usefixtures("quiet")
def test_one_byte_at_a_time(address: tuple[str, int], subjects: dict[str, Subject]) -> None:
    """A request that trickles in, head and body, byte by byte, is answered like any other."""
    with connection(address) as conn:
        for byte in head_of("/predict/trees", f"Content-Length: {len(GOOD_TEXT)}") + GOOD_TEXT:
            conn.sendall(bytes([byte]))
        answer = read_answer(conn)
    assert answer is not None
    check(answer, subjects["trees"], GOOD_TEXT)
    assert answer.status == 200


@pytest.mark.usefixtures("quiet")
def test_chunks_of_one_byte(address: tuple[str, int], subjects: dict[str, Subject]) -> None:
    """A chunked body of one byte per chunk is put together again."""
    with connection(address) as conn:
        conn.sendall(head_of("/predict/trees", "Transfer-Encoding: chunked"))
        for byte in GOOD_TEXT:
            conn.sendall(b"1\r\n%c\r\n" % byte)
        conn.sendall(b"0\r\n\r\n")
        answer = read_answer(conn)
    assert answer is not None
    check(answer, subjects["trees"], GOOD_TEXT)
    assert answer.status == 200


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("sent", [0, 1, len(GOOD_TEXT)])
@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
def test_a_length_that_is_too_long(address: tuple[str, int], sent: int, way: str) -> None:
    """A client that leaves before the body it announced is complete gets no answer, and nobody else notices."""
    with connection(address) as conn:
        conn.sendall(head_of("/predict/trees", f"Content-Length: {len(GOOD_TEXT) + 10}") + GOOD_TEXT[:sent])
        if way == "half-close":
            conn.shutdown(socket.SHUT_WR)
            answer = read_answer(conn)
            assert answer is None or answer.status == 400
        elif way == "reset":
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


@pytest.mark.usefixtures("quiet")
def test_a_disconnect_in_the_middle_of_a_chunk(address: tuple[str, int]) -> None:
    """A chunked body that breaks off is forgotten."""
    for part in (b"", b"5\r\n", b"5\r\n{", b'5\r\n{"inp\r\n'):
        with connection(address) as conn:
            conn.sendall(head_of("/predict/trees", "Transfer-Encoding: chunked") + part)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("missing", [1, len(GOOD_TEXT) - 1, len(GOOD_TEXT)])
def test_a_length_that_is_too_short(address: tuple[str, int], missing: int) -> None:
    """Only the bytes announced are the body; what follows is not mistaken for more of it."""
    with connection(address) as conn:
        length = len(GOOD_TEXT) - missing
        conn.sendall(head_of("/predict/trees", f"Content-Length: {length}") + GOOD_TEXT)
        answer = read_answer(conn)
    assert answer is not None
    assert answer.status == 400


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("length", [LIMIT + 1, 2 * 1024**3, 10**18])
def test_a_declared_body_over_the_limit(address: tuple[str, int], length: int) -> None:
    """A body declared too large is refused before a byte of it is sent, and the connection is closed."""
    with connection(address) as conn:
        conn.sendall(head_of("/predict/trees", f"Content-Length: {length}"))
        answer = read_answer(conn)
        assert answer is not None
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        answer.problem()
        assert conn.recv(1) == b""


@pytest.mark.usefixtures("quiet")
def test_a_chunked_body_over_the_limit(address: tuple[str, int]) -> None:
    """A body that never says how long it is is refused once it is too long, and the connection is closed."""
    chunk = b"2710\r\n%b\r\n" % (b" " * 10_000)
    with connection(address) as conn:
        conn.sendall(head_of("/predict/trees", "Transfer-Encoding: chunked"))
        for _ in range(LIMIT // 10_000 + 1):
            conn.sendall(chunk)
        answer = read_answer(conn)
        assert answer is not None
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        answer.problem()


@pytest.mark.usefixtures("quiet")
def test_a_body_as_large_as_the_limit(address: tuple[str, int], subjects: dict[str, Subject]) -> None:
    """The limit itself is allowed."""
    body = GOOD_TEXT + b" " * (LIMIT - len(GOOD_TEXT))
    answer = socket_caller(address)("POST", "/predict/trees", body)
    assert answer.status == 200
    check(answer, subjects["trees"], body)


@pytest.mark.usefixtures("quiet")
def test_good_requests_among_bad_ones(address: tuple[str, int], subjects: dict[str, Subject]) -> None:
    """Clients that stall, lie and leave do not hold up the ones that behave."""
    with connection(address) as stalled, connection(address) as lying:
        stalled.sendall(head_of("/predict/trees", "Content-Length: 1000") + b"{")
        lying.sendall(head_of("/predict/trees", "Content-Length: 3") + b"}}}GET nonsense\r\n\r\n")
        assert predict(socket_caller(address), "trees", {"x": 1}).status == 422
        for subject in subjects.values():
            subject.check_serves(socket_caller(address))
