"""The async server over a real registry, real artifacts and real models."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from sklearn.preprocessing import FunctionTransformer

import modelserve as ms
from modelserve import wiring
from modelserve.adapters.features.memory import MemoryFeatures
from modelserve.adapters.frameworks.sklearn.model import SklearnModel
from modelserve.errors import ArtifactCorrupt, ArtifactUnsafe
from modelserve.events import LoadRejected, Served, VersionLoaded
from modelserve.serving.inference import Inference
from modelserve.testing.models import tells, telltale

X = np.array([[1.0], [2.0]])


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with two versions of the model ``m``, the first in production."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    for number in (1, 2):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")
    return registry


@pytest.fixture
async def server(registry: ms.Registry, tmp_path: Path) -> AsyncIterator[ms.AsyncModelServer]:
    """A started server that would not poll within a test: changes reach it as hints."""
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        yield server


async def until(condition: Callable[[], bool], server: ms.AsyncModelServer) -> None:
    """Wait for the next events of a server until the condition holds."""
    changed = asyncio.Event()
    stop = server.observe(lambda _: changed.set())
    while not condition():
        changed.clear()
        await asyncio.wait_for(changed.wait(), 20)
    stop()


def production(server: ms.AsyncModelServer) -> str | None:
    return server.status()[0].production


async def test_a_prediction_names_its_version_and_its_latency(server: ms.AsyncModelServer) -> None:
    """A prediction carries the answer, the version that gave it, a latency and an id."""
    answer = await server.predict("m", {"x": [5.0]})
    assert answer.prediction == pytest.approx(1005.0)
    assert answer.model_version == "1"
    assert 0 < answer.latency_ms < 1000
    assert len(answer.request_id) == 36
    assert not answer.cached


async def test_the_callers_request_id_is_kept(server: ms.AsyncModelServer) -> None:
    """An id given with the request comes back with the answer."""
    assert (await server.predict("m", {"x": [5.0]}, request_id="abc")).request_id == "abc"


async def test_many_rows_are_answered_in_order_by_one_version(server: ms.AsyncModelServer) -> None:
    """``predict_many`` answers each row at its place; no rows get no answers."""
    many = await server.predict_many("m", [{"x": [float(i)]} for i in range(600)])
    assert [answer.prediction for answer in many] == pytest.approx([1000.0 + i for i in range(600)])
    assert await server.predict_many("m", []) == []


async def test_concurrent_callers_get_their_own_answers(server: ms.AsyncModelServer, no_blocking: None) -> None:
    """A thousand concurrent requests are batched, and nobody gets another's result; the loop is never blocked."""
    answers = await asyncio.gather(*(server.predict("m", {"x": [float(i)]}) for i in range(1000)))
    assert [tells(answer.prediction, i) for i, answer in enumerate(answers)] == [1] * 1000


async def test_bad_input_names_the_field_and_the_row(server: ms.AsyncModelServer) -> None:
    """What does not fit the signature is refused by name, before it reaches the queue."""
    with pytest.raises(ms.InvalidInput, match="expected float64") as refusal:
        await server.predict("m", {"x": ["five"]})
    assert refusal.value.field == "x"
    with pytest.raises(ms.InvalidInput) as refusal:
        await server.predict_many("m", [{"x": [1.0]}, {"y": [1.0]}])
    assert refusal.value.field == "instances[1].x"
    with pytest.raises(ms.InvalidInput, match="at most 1024"):
        await server.predict_many("m", [{"x": [1.0]}] * 1025)


async def test_unknown_models_and_versions_are_told_apart(server: ms.AsyncModelServer) -> None:
    """A model that is not there, and a version that is not loaded, each have their error."""
    with pytest.raises(ms.ModelNotFound):
        await server.predict("nobody", {"x": [1.0]})
    with pytest.raises(ms.VersionNotFound):
        await server.predict("m", {"x": [1.0]}, version="2")


async def test_a_deadline_in_the_past_is_exceeded(server: ms.AsyncModelServer) -> None:
    """A request whose time is over before it runs gets ``DeadlineExceeded``."""
    with pytest.raises(ms.DeadlineExceeded):
        await server.predict("m", {"x": [1.0]}, timeout_ms=0)


async def test_a_missed_deadline_names_the_limit_that_was_asked_for(
    server: ms.AsyncModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was spent before the model was asked does not make the limit that the error names smaller."""
    validate = Inference.validate

    async def validate_slowly(inference: Inference) -> None:
        await validate(inference)
        inference.deadline -= 60

    monkeypatch.setattr(Inference, "validate", validate_slowly)
    with pytest.raises(ms.DeadlineExceeded, match="within 250 ms"):
        await server.predict("m", {"x": [1.0]}, timeout_ms=250)


async def test_promotion_and_rollback_reach_the_server_by_hint(
    server: ms.AsyncModelServer, registry: ms.Registry
) -> None:
    """A change made through the same registry object is served without waiting for a poll."""
    registry.promote("m", "2")
    await until(lambda: production(server) == "2", server)
    assert tells((await server.predict("m", {"x": [3.0]})).prediction, 3) == 2
    assert tells((await server.predict("m", {"x": [3.0]}, version="1")).prediction, 3) == 1
    registry.rollback("m")
    await until(lambda: production(server) == "1", server)


async def test_a_promotion_elsewhere_is_found_by_polling(registry: ms.Registry, tmp_path: Path) -> None:
    """A change made by another process is served after the next poll."""
    elsewhere = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", poll_s=0.02) as server:
        elsewhere.promote("m", "2")
        await until(lambda: production(server) == "2", server)


async def test_a_model_without_production_is_not_ready_until_promoted(registry: ms.Registry, tmp_path: Path) -> None:
    """A configured model that nobody promoted makes the server not ready, and is served once promoted."""
    registry.register("new", "1", telltale(1), example=X)
    models = {"new": ms.ModelOptions()}
    async with ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        assert not server.ready
        with pytest.raises(ms.NotReady, match="promote"):
            await server.predict("new", {"x": [1.0]})
        registry.promote("new", "1")
        await until(lambda: server.ready, server)


async def test_a_staging_model_does_not_make_the_server_unready(
    server: ms.AsyncModelServer, registry: ms.Registry
) -> None:
    """With no list of models, one that has no production version is not waited for."""
    assert server.ready
    registry.register("draft", "1", telltale(1), example=X)
    assert server.ready
    assert [status.model_name for status in server.status()] == ["m"]


async def test_an_empty_registry_is_not_ready(tmp_path: Path) -> None:
    """No model to serve is not the same as every model ready."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/empty.db")
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache") as server:
        assert not server.ready


async def test_a_flipped_byte_in_the_store_is_never_loaded(
    server: ms.AsyncModelServer, registry: ms.Registry, tmp_path: Path
) -> None:
    """A version whose stored bytes changed after registration is refused, and the old one serves on."""
    artifact = registry.get("m", "2").artifact
    blob = tmp_path / "artifacts" / artifact.key
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    refusals: list[Any] = []
    server.observe(refusals.append)
    registry.promote("m", "2")
    await until(lambda: any(isinstance(event, LoadRejected) for event in refusals), server)
    error = next(event.error for event in refusals if isinstance(event, LoadRejected))
    assert isinstance(error, ArtifactCorrupt)
    assert artifact.sha256 in str(error)
    assert tells((await server.predict("m", {"x": [3.0]})).prediction, 3) == 1
    assert server.ready


async def test_a_flipped_byte_in_the_cache_is_set_aside_and_fetched_again(
    registry: ms.Registry, tmp_path: Path
) -> None:
    """A blob damaged on the local disk between two runs is not loaded; the good one is fetched from the store."""
    artifact = registry.get("m", "1").artifact
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache"):
        pass
    blob = tmp_path / "cache" / artifact.key
    blob.chmod(0o644)
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache") as server:
        assert tells((await server.predict("m", {"x": [3.0]})).prediction, 3) == 1
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1


async def test_a_pickle_is_refused_until_it_is_allowed(registry: ms.Registry, tmp_path: Path) -> None:
    """A joblib artifact is not loaded by default, and the error says how to allow it."""
    registry.register("pickled", "1", telltale(7), example=X, format="joblib")
    registry.promote("pickled", "1")
    refusals: list[Any] = []
    server = ms.AsyncModelServer(registry, {"pickled": ms.ModelOptions()}, cache_dir=tmp_path / "cache")
    server.observe(refusals.append)
    async with server:
        assert isinstance(refusals[0].error, ArtifactUnsafe)
        assert "allow_pickle=True" in str(refusals[0].error)
        with pytest.raises(ms.NotReady):
            await server.predict("pickled", {"x": [1.0]})
    allowed = {"pickled": ms.ModelOptions(allow_pickle=True)}
    async with ms.AsyncModelServer(registry, allowed, cache_dir=tmp_path / "cache") as server:
        assert tells((await server.predict("pickled", {"x": [1.0]})).prediction, 1) == 7


async def test_a_version_that_answers_its_golden_example_differently_is_refused(
    server: ms.AsyncModelServer, registry: ms.Registry
) -> None:
    """A version that does not reproduce the answers it gave at registration never serves."""
    good = registry.get("m", "2")
    example = registry.artifacts.put_bytes(b'{"inputs":[{"x":[1.0]}],"outputs":[77.0]}', format="example-json")
    registry._insert(
        model_name="m",
        version="3",
        framework="sklearn",
        artifact=good.artifact,
        signature=good.signature,
        load_options=good.load_options,
        example=example,
        conversion=None,
        metrics={},
        tags={},
        actor=None,
        reason="",
    )
    registry.promote("m", "3")
    await until(lambda: server.status()[0].problem is not None, server)
    assert "golden example, row 0: registered answer 77.0, got 2001" in str(server.status()[0].problem)
    assert production(server) == "1"


async def test_a_row_the_model_fails_on_leaves_its_batch_mates_alone(registry: ms.Registry, tmp_path: Path) -> None:
    """Only the caller whose row made the model raise gets ``InferenceFailed``."""
    registry.register(
        "picky", "1", FunctionTransformer(_fails_on_thirteen), example=X, method="transform", format="joblib"
    )
    registry.promote("picky", "1")
    models = {"picky": ms.ModelOptions(allow_pickle=True)}
    async with ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache") as server:
        calls = [server.predict("picky", {"x": [float(i)]}) for i in range(20)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [i for i, answer in enumerate(answers) if isinstance(answer, ms.InferenceFailed)] == [13]
    assert [a.prediction for a in answers if not isinstance(a, BaseException)] == [[i] for i in range(20) if i != 13]


def _fails_on_thirteen(x: Any) -> Any:
    if (np.asarray(x) == 13).any():
        raise ValueError("thirteen")
    return x


async def test_every_call_is_told_to_observers(server: ms.AsyncModelServer) -> None:
    """Observers see each call with its version, rows and error; one that raises disturbs nobody."""
    seen: list[Any] = []

    def broken(_: object) -> None:
        raise RuntimeError("observer")

    server.observe(broken)
    server.observe(seen.append)
    await server.predict("m", {"x": [1.0]}, request_id="good")
    with pytest.raises(ms.InvalidInput):
        await server.predict("m", {}, request_id="bad")
    good, bad = [event for event in seen if isinstance(event, Served)]
    assert (good.request_id, good.version, good.rows, good.error) == ("good", "1", 1, None)
    assert isinstance(bad.error, ms.InvalidInput)


async def test_observers_learn_why_a_version_ran_and_whether_it_did(
    server: ms.AsyncModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that names a version is pinned, also to the one in production; one without results ran nothing."""
    seen: list[Any] = []
    server.observe(seen.append)
    await server.predict("m", {"x": [1.0]}, key="user-7")
    await server.predict_many("m", [{"x": [1.0]}] * 3, version="1")
    with pytest.raises(ms.InvalidInput):
        await server.predict("m", {})
    with pytest.raises(ms.DeadlineExceeded):
        await server.predict("m", {"x": [1.0]}, timeout_ms=0)
    monkeypatch.setattr(SklearnModel, "infer", Mock(side_effect=ValueError("no such row")))
    with pytest.raises(ms.InferenceFailed):
        await server.predict("m", {"x": [1.0]}, version="1")
    assert [(event.arm, event.executed) for event in seen if isinstance(event, Served)] == [
        ("production", True),
        ("pinned", True),
        ("production", False),
        ("production", False),
        ("pinned", True),  # the model ran, and failed
    ]


@pytest.mark.promise("P1")
async def test_closing_finishes_what_is_in_flight_and_refuses_what_comes(registry: ms.Registry, tmp_path: Path) -> None:
    """On close, requests already taken are answered; later ones get ``NotReady``; closing twice is harmless."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    await server.start()
    calls = [asyncio.create_task(server.predict("m", {"x": [float(i)]})) for i in range(50)]
    await asyncio.sleep(0)
    await server.close()
    assert [tells(call.result().prediction, i) for i, call in enumerate(calls)] == [1] * 50
    with pytest.raises(ms.NotReady, match="closed"):
        await server.predict("m", {"x": [1.0]})
    await server.close()


async def test_a_server_can_be_started_again(registry: ms.Registry, tmp_path: Path) -> None:
    """After close, start makes it serve again."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    for _ in range(2):
        async with server:
            assert (await server.predict("m", {"x": [1.0]})).model_version == "1"


async def test_several_starts_and_closes_at_once_are_one(registry: ms.Registry, tmp_path: Path) -> None:
    """Concurrent starts share one start, concurrent closes one close, and nothing is left behind."""
    before = set(threading.enumerate())
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    await asyncio.gather(server.start(), server.start(), server.start())
    assert len([task for task in asyncio.all_tasks() if task.get_name() == "modelserve-poll"]) == 1
    await asyncio.gather(server.close(), server.close())
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("modelserve")] == []
    started = [each for each in set(threading.enumerate()) - before if each.name.startswith("modelserve")]
    for thread in started:
        await asyncio.to_thread(thread.join, 10)
    assert not any(thread.is_alive() for thread in started)


async def test_a_close_overtakes_a_start(registry: ms.Registry, tmp_path: Path) -> None:
    """Closing while the models load ends the start, however far it is, and the server can be started again."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    for turns in (0, 1, 3, 10, 30):
        starting = asyncio.create_task(server.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.close()
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        assert outcome is None or isinstance(outcome, ms.NotReady)
        await server.close()
        assert not server.ready
    async with server:
        assert (await server.predict("m", {"x": [1.0]})).model_version == "1"


async def test_a_cancelled_close_goes_on(registry: ms.Registry, tmp_path: Path) -> None:
    """Whoever loses patience with a close can ask again, and the server ends closed."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    await server.start()
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await server.close()
    with pytest.raises(ms.NotReady):
        await server.predict("m", {"x": [1.0]})
    async with server:
        assert server.ready


async def test_a_start_that_fails_can_be_repeated(registry: ms.Registry, tmp_path: Path) -> None:
    """A cache folder that cannot be made is told, and does not spoil the next start."""
    (tmp_path / "cache").write_text("in the way")
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    with pytest.raises(ms.ConfigError, match=r"cache_dir: .*cache cannot be used"):
        await server.start()
    (tmp_path / "cache").unlink()
    async with server:
        assert server.ready


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"poll_s": 0}, "poll_s: expected seconds"),
        ({"poll_s": math.nan}, "poll_s: expected seconds"),
        ({"cache_bytes": "20GB"}, "cache_bytes: expected a number of bytes"),
        ({"cache_dir": ""}, "cache_dir: name a folder"),
        ({"metrics_dir": ""}, "metrics_dir: name a folder"),
        ({"models": {"m": {"timeout_ms": 5}}}, r"models.m: expected ModelOptions\(...\), got dict"),
        ({"log": True}, "log: expected a database's URL"),
    ],
)
def test_an_option_that_is_none_is_refused_at_once(
    registry: ms.Registry, options: dict[str, Any], problem: str
) -> None:
    """What settings would refuse the constructor refuses too, instead of the first load."""
    with pytest.raises(ms.ConfigError, match=problem):
        ms.AsyncModelServer(registry, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_folders_are_those_of_when_they_were_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that changes its directory before it starts has one cache and one store all the same."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    registry = ms.Registry("sqlite:///models.db", "artifacts")
    server = ms.AsyncModelServer(registry, cache_dir="cache")
    monkeypatch.chdir(tmp_path)
    registry.register("m", "1", telltale(1), example=np.array([[1.0], [2.0]]))
    registry.promote("m", "1")
    async with server:
        assert (await server.predict("m", {"x": [1.0]})).model_version == "1"
    assert {"artifacts", "cache"} <= names(tmp_path / "here")
    assert not {"artifacts", "cache"} & names(tmp_path)


async def in_time(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.promise("P4")
async def test_a_registry_whose_file_is_away_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    """A start without the file serves what was served last, says that it is stale, and goes on when it is back."""
    database, away = tmp_path / "models.db", tmp_path / "away.db"
    with ms.Registry(f"sqlite:///{database}") as registry:
        registry.register("m", "1", telltale(1), example=np.array([[1.0], [2.0]]))
        registry.promote("m", "1")
        async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", log=False) as server:
            await in_time(lambda: any((tmp_path / "cache" / "applied").rglob("*.json")))
    database.rename(away)
    registry = ms.Registry(f"sqlite:///{database}", str(tmp_path / "artifacts"))
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", poll_s=0.05, log=False) as server:
        assert tells((await server.predict("m", {"x": [3.0]})).prediction, 3) == 1
        assert server.status()[0].stale is not None
        assert not database.exists()
        away.rename(database)
        await in_time(lambda: server.status()[0].stale is None)


async def test_calls_from_another_loop_reach_the_server_where_it_lives(registry: ms.Registry, tmp_path: Path) -> None:
    """Starting, asking and closing in another thread's loop do what they do in the server's own."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    await server.start()

    async def use() -> Any:
        await server.start()
        answer = await server.predict("m", {"x": [3.0]})
        await server.close()
        return answer.prediction

    assert tells(await asyncio.to_thread(lambda: asyncio.run(use())), 3) == 1
    assert server.state == "closed"


async def test_an_answer_is_given_up_with_its_caller_in_another_loop(registry: ms.Registry, tmp_path: Path) -> None:
    """A time limit in the caller's loop takes the request out of the queue in the server's."""
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache") as server:
        given_up = asyncio.Event()
        server.observe(lambda _: given_up.set())
        loop, pool = asyncio.get_running_loop(), server.serving_version("m").pool
        pool.submit = lambda *_: loop.create_future()  # type: ignore[method-assign]

        async def impatient() -> None:
            async with asyncio.timeout(0.05):
                await server.predict("m", {"x": [3.0]}, timeout_ms=1e6)

        with pytest.raises(TimeoutError):
            await asyncio.to_thread(lambda: asyncio.run(impatient()))
        await asyncio.wait_for(given_up.wait(), 20)


async def test_an_unstarted_server_says_so(registry: ms.Registry, caplog: pytest.LogCaptureFixture) -> None:
    """Predicting before start is refused with the way to start, each time; the log says it once."""
    server = ms.AsyncModelServer(registry)
    for _ in range(3):
        with pytest.raises(ms.NotReady, match=r"not started: enter it .* in the lifespan"):
            await server.predict("m", {"x": [1.0]})
    assert ["was not started" in record.getMessage() for record in caplog.records] == [True]


async def test_a_server_dropped_while_running_complains(registry: ms.Registry, tmp_path: Path) -> None:
    """Losing a started server without closing it is a ``ResourceWarning``."""
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache")
    await server.start()
    with pytest.warns(ResourceWarning, match="without close"):
        server.__del__()
    await server.close()
    gc.collect()


@pytest.mark.promise("P2")
async def test_versions_are_swapped_under_load_without_a_failure(
    server: ms.AsyncModelServer, registry: ms.Registry
) -> None:
    """While 64 callers go on, promotions and rollbacks fail nobody, and every answer is its named version's own."""
    stop = asyncio.Event()
    answered = {"1": 0, "2": 0}

    async def caller(x: float) -> None:
        while not stop.is_set():
            answer = await server.predict("m", {"x": [x]})
            assert str(tells(answer.prediction, x)) == answer.model_version
            answered[answer.model_version] += 1

    callers = [asyncio.create_task(caller(float(i))) for i in range(64)]
    for turn in range(10):
        registry.promote("m", "2") if turn % 2 == 0 else registry.rollback("m")
        wanted = registry.production("m").version
        await until(lambda wanted=wanted: production(server) == wanted, server)  # type: ignore[misc]
    stop.set()
    await asyncio.gather(*callers)
    assert min(answered.values()) > 0


async def test_swaps_are_announced(server: ms.AsyncModelServer, registry: ms.Registry) -> None:
    """Observers are told which version took over at which generation."""
    events: list[Any] = []
    server.observe(events.append)
    registry.promote("m", "2")
    await until(lambda: production(server) == "2", server)
    (loaded,) = [event for event in events if isinstance(event, VersionLoaded)]
    assert (loaded.model_name, loaded.version) == ("m", "2")
    assert loaded.generation == registry.deployment("m").generation


async def test_a_server_is_built_from_one_file(tmp_path: Path, registry: ms.Registry) -> None:
    """``from_config`` reads registry, cache and per-model options from TOML."""
    config = tmp_path / "modelserve.toml"
    config.write_text(
        f'registry = "sqlite:///{tmp_path}/models.db"\ncache_dir = "{tmp_path}/cache"\n[models.m]\nqueue_limit = 3\n'
    )
    async with ms.AsyncModelServer.from_config(config) as server:
        with pytest.raises(ms.InvalidInput, match="at most 3"):
            await server.predict_many("m", [{"x": [1.0]}] * 4)


@pytest.mark.parametrize("request_id", ["a\0b", "a\nb", "x" * 129, uuid.uuid4()])
async def test_an_id_that_no_log_could_hold_is_refused(server: ms.AsyncModelServer, request_id: Any) -> None:
    """A request's id is a short string of printable characters; anything else is named."""
    with pytest.raises(ms.InvalidInput, match="request_id"):
        await server.predict("m", {"x": [1.0]}, request_id=request_id)
    assert (await server.predict("m", {"x": [1.0]}, request_id="ü-1")).request_id == "ü-1"


@pytest.mark.parametrize("key", ["", "x" * 257, "a\0b", 7])
async def test_a_key_that_no_header_could_hold_is_refused(server: ms.AsyncModelServer, key: Any) -> None:
    """A routing key follows the same rule from Python as over HTTP."""
    with pytest.raises(ms.InvalidInput, match="printable") as refusal:
        await server.predict("m", {"x": [1.0]}, key=key)
    assert refusal.value.field == "key"
    assert (await server.predict("m", {"x": [1.0]}, key="José 🐢")).model_version == "1"


async def test_a_caller_who_gives_up_is_told_to_observers(server: ms.AsyncModelServer) -> None:
    """A request that its host stops waiting for ends as cancelled, not as if it had never been."""
    told: list[Any] = []
    server.observe(told.append)
    asking = asyncio.create_task(server.predict("m", {"x": [1.0]}))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    (event,) = [each for each in told if isinstance(each, Served)]
    assert isinstance(event.error, asyncio.CancelledError)


@pytest.mark.promise("P3")
@pytest.mark.parametrize("fault", ["fails", "hangs"])
async def test_what_does_not_close_takes_nothing_else_along(
    registry: ms.Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    """A feature store that fails to close, or never does, costs no record of the log; the server can start again."""

    async def close(_: object) -> None:
        if fault == "fails":
            raise RuntimeError("cannot close")
        await asyncio.Event().wait()

    monkeypatch.setattr(MemoryFeatures, "close", close)
    monkeypatch.setattr(wiring, "_CLOSE_S", 0.05)
    models = {"m": ms.ModelOptions(log_sample_rate=1.0)}
    server = ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache", poll_s=3600, features="memory://")
    for _ in range(2):
        await server.start()
        for _ in range(10):
            await server.predict("m", {"x": [1.0]})
        await server.close()
    assert ("cannot close" if fault == "fails" else "did not end within") in caplog.text
    logged = await asyncio.to_thread(lambda: [len(batch["id"]) for batch in registry.inference_log().read("m")])
    assert logged == [20]
