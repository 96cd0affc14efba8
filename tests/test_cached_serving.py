"""Cached predictions over a real registry, real models and a real Redis: what a request sees, and under faults."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pytest
import redis as redis_py
from sklearn.preprocessing import FunctionTransformer

import modelserve as ms
from modelserve import plugins
from modelserve.adapters.cache.redis import RedisCache
from modelserve.caching import MemoryCache
from modelserve.caching.shared import Shared
from modelserve.errors import InvalidInput
from modelserve.events import FeaturesRead, Served
from modelserve.ports import CacheItem
from modelserve.testing.models import tells, telltale
from tests import servers
from tests.http.driver import call_asgi
from tests.tcp_proxy import tcp_proxy

X = np.array([[1.0], [2.0]])
CACHED = {"m": ms.ModelOptions(cache_ttl_s=60)}


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with two versions of the model ``m``, the first in production."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    for number in (1, 2):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")
    return registry


def serve(registry: ms.Registry, tmp_path: Path, cache: Any = None, **options: Any) -> ms.AsyncModelServer:
    models = {"m": ms.ModelOptions(**{"cache_ttl_s": 60, **options})}
    return ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache", poll_s=3600, cache=cache)


def batches(server: ms.AsyncModelServer) -> int:
    """How many batches the model has run so far."""
    pool = server.status()[0].pool
    assert pool is not None
    return pool.batches.batches


async def until_kept(cache: RedisCache, count: int) -> None:
    """Wait until Redis holds so many predictions."""
    client = cache._opened()
    async with asyncio.timeout(20):
        while len(await client.keys(f"{cache._space}*")) < count:  # noqa: ASYNC110  # what it waits for has no event
            await asyncio.sleep(0.002)


# -- in process --------------------------------------------------------------------------------------------


async def test_the_same_inputs_are_answered_once(registry: ms.Registry, tmp_path: Path, no_blocking: None) -> None:
    """The second time the answer is the same, is marked, and the model did not run; other inputs run."""
    async with serve(registry, tmp_path) as server:
        first, second, other = [await server.predict("m", {"x": [x]}) for x in (5.0, 5.0, 6.0)]
        assert (first.prediction, first.cached) == (second.prediction, False)
        assert second.cached
        assert not other.cached
        assert second.request_id != first.request_id
        assert batches(server) == 2


async def test_however_the_numbers_are_written(registry: ms.Registry, tmp_path: Path) -> None:
    """An integer, a NumPy array and minus zero are the inputs that they are."""
    async with serve(registry, tmp_path) as server:
        for x in ([0.0], [0], [-0.0], np.array([0.0]), (0,)):
            answer = await server.predict("m", {"x": x})
            assert tells(answer.prediction, 0.0) == 1
        assert answer.cached
        assert batches(server) == 1


async def test_without_a_time_to_live_nothing_is_kept(registry: ms.Registry, tmp_path: Path) -> None:
    """By default every request runs."""
    async with serve(registry, tmp_path, cache_ttl_s=0) as server:
        answers = [await server.predict("m", {"x": [5.0]}) for _ in range(3)]
        assert not any(answer.cached for answer in answers)
        assert batches(server) == 3


async def test_of_several_rows_only_the_unknown_run(registry: ms.Registry, tmp_path: Path) -> None:
    """Each row says whether it was known; observers are told the same."""
    served: list[Any] = []
    async with serve(registry, tmp_path) as server:
        server.observe(served.append)
        await server.predict_many("m", [{"x": [1.0]}, {"x": [2.0]}])
        many = await server.predict_many("m", [{"x": [x]} for x in (3.0, 1.0, 2.0, 4.0)])
        assert [tells(answer.prediction, x) for answer, x in zip(many, (3, 1, 2, 4), strict=True)] == [1] * 4
        assert [answer.cached for answer in many] == [False, True, True, False]
    assert [list(event.cached) for event in served if isinstance(event, Served)] == [
        [False] * 2,
        [False, True, True, False],
    ]


async def test_a_request_that_the_cache_answers_whole_executes_nothing(registry: ms.Registry, tmp_path: Path) -> None:
    """Observers learn which requests the model worked for: one unknown row among several is enough."""
    served: list[Any] = []
    async with serve(registry, tmp_path) as server:
        server.observe(served.append)
        for xs in ([1.0], [1.0], [1.0, 2.0], [2.0, 1.0]):
            await server.predict_many("m", [{"x": [x]} for x in xs])
        await asyncio.gather(*(server.predict("m", {"x": [3.0]}) for _ in range(2)))
    events = [event for event in served if isinstance(event, Served)]
    assert [event.executed for event in events] == [True, False, True, False, True, True]
    assert {event.arm for event in events} == {"production"}


async def test_over_http_a_request_is_cached_if_all_of_it_was(registry: ms.Registry, tmp_path: Path) -> None:
    """The document says ``cached`` for one known row, and for several if each was known."""
    async with serve(registry, tmp_path) as server:
        app = ms.asgi(server)
        told = []
        for body in ({"inputs": {"x": [1]}}, {"inputs": {"x": [1]}}, {"instances": [{"x": [1]}, {"x": [2]}]}) * 2:
            document = await post(app, body)
            told.append(document["cached"])
        assert told == [False, True, False, True, True, True]


async def post(app: Any, body: Any) -> Any:
    """Ask over the ASGI face."""
    return (await call_asgi(app, "POST", "/predict/m", json.dumps(body).encode())).json()


@pytest.mark.promise("P2")
async def test_another_version_has_answers_of_its_own(registry: ms.Registry, tmp_path: Path) -> None:
    """After a promotion and a rollback the answer is that of the version it names."""
    async with serve(registry, tmp_path) as server:
        told = []
        for version, change in (("1", ""), ("2", "promote"), ("1", "rollback")):
            if change:
                registry.promote("m", "2") if change == "promote" else registry.rollback("m")
                await until_production(server, version)
            for _ in range(2):
                answer = await server.predict("m", {"x": [3.0]})
                assert answer.model_version == version
                assert tells(answer.prediction, 3.0) == int(version)
                told.append(answer.cached)
        assert told == [False, True, False, True, True, True]


async def until_production(server: ms.AsyncModelServer, version: str) -> None:
    changed = asyncio.Event()
    stop = server.observe(lambda _: changed.set())
    async with asyncio.timeout(20):
        while server.status()[0].production != version:
            await changed.wait()
            changed.clear()
    stop()


async def test_a_stampede_is_one_execution(registry: ms.Registry, tmp_path: Path) -> None:
    """Five hundred callers on a cold key have the model run one row, once."""
    async with serve(registry, tmp_path) as server:
        answers = await asyncio.gather(*(server.predict("m", {"x": [7.0]}) for _ in range(500)))
        assert {tells(answer.prediction, 7.0) for answer in answers} == {1}
        pool = server.status()[0].pool
        assert pool is not None
        assert pool.batches.sizes == {1: 1}


def test_the_sync_face_has_it_too(registry: ms.Registry, tmp_path: Path) -> None:
    """``ModelServer`` answers from a cache of given size."""
    cache = "memory://?max_entries=1"
    with ms.ModelServer(registry, CACHED, cache_dir=tmp_path / "cache", poll_s=3600, cache=cache) as server:
        cached = [server.predict("m", {"x": [x]}).cached for x in (1.0, 1.0, 2.0, 1.0)]
    assert cached == [False, True, False, False]


def test_a_cache_from_the_settings(registry: ms.Registry, tmp_path: Path) -> None:
    """``cache`` and ``cache_ttl_s`` of a file reach the server, which can be closed and started again."""
    path = tmp_path / "modelserve.toml"
    path.write_text(
        f'registry = "sqlite:///{tmp_path}/models.db"\ncache_dir = "{tmp_path}/cache"\n'
        'cache = "memory://?max_entries=5"\n[models.m]\ncache_ttl_s = 60\n'
    )
    server = ms.ModelServer.from_config(path)
    for _ in range(2):
        with server:
            assert [server.predict("m", {"x": [1.0]}).cached for _ in range(2)] == [False, True]


async def test_a_cache_of_the_hosts_is_left_open(registry: ms.Registry, tmp_path: Path) -> None:
    """An object given as the cache outlives the server, with what is in it."""
    cache = MemoryCache()
    for known in (False, True):
        async with serve(registry, tmp_path, cache) as server:
            assert (await server.predict("m", {"x": [1.0]})).cached is known
    assert len(cache) == 1


# -- Redis -------------------------------------------------------------------------------------------------


@pytest.fixture
async def kept(redis_url: str) -> AsyncIterator[RedisCache]:
    """The Redis that the servers share, as a client of it sees it."""
    cache = RedisCache(redis_url)
    yield cache
    await cache.close()


async def test_servers_share_what_one_of_them_computed(
    registry: ms.Registry, tmp_path: Path, redis_url: str, kept: RedisCache, no_blocking: None
) -> None:
    """What one server answered another one knows, without running the model."""
    url = f"{redis_url}&budget_ms=1000"
    here = await asyncio.to_thread(serve, registry, tmp_path, url)
    there = await asyncio.to_thread(serve, registry, tmp_path, url)
    async with here, there:
        await asyncio.gather(*(here.predict("m", {"x": [float(i)]}) for i in range(50)))
        await until_kept(kept, 50)
        answers = await asyncio.gather(*(there.predict("m", {"x": [float(i)]}) for i in range(50)))
        assert [tells(answer.prediction, i) for i, answer in enumerate(answers)] == [1] * 50
        assert all(answer.cached for answer in answers)
        assert batches(there) == 0


@pytest.mark.promise("P2")
@pytest.mark.parametrize("lie", ["another key", "truncated", "garbage", "pickle", "another type", "another form"])
async def test_whatever_lies_under_a_key_is_a_miss(
    registry: ms.Registry, tmp_path: Path, redis_url: str, kept: RedisCache, lie: str
) -> None:
    """What is not this key's answer is not given: the model runs, and what it says is put in its place."""
    url = f"{redis_url}&budget_ms=1000"
    async with serve(registry, tmp_path, url) as server:
        for x in (1.0, 2.0):
            await server.predict("m", {"x": [x]})
        await until_kept(kept, 2)
    client = kept._opened()
    one, other = await client.keys(f"{kept._space}*")
    whole = await client.get(one)
    lies = {
        "another key": await client.get(other),
        "truncated": whole[:-3],
        "garbage": b"\x80\x04garbage",
        "pickle": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00G?\xf0\x00\x00\x00\x00\x00\x00.",
        "another form": whole.replace(b'"modelserve":1', b'"modelserve":9'),
    }
    await client.delete(one)
    await (client.rpush(one, "x") if lie == "another type" else client.set(one, lies[lie]))
    async with serve(registry, tmp_path, url) as server:
        answers = [await server.predict("m", {"x": [x]}) for x in (1.0, 2.0)]
        assert [tells(answer.prediction, x) for answer, x in zip(answers, (1, 2), strict=True)] == [1, 1]
        assert sorted(answer.cached for answer in answers) == [False, True]
        async with asyncio.timeout(20):
            while await client.type(one) != b"string" or await client.get(one) != whole:  # noqa: ASYNC110  # what it waits for has no event
                await asyncio.sleep(0.002)


@pytest.mark.promise("P7")
@pytest.mark.timeout(120)
async def test_ten_thousand_reads_that_are_cancelled_or_late(redis_server: servers.RedisServer, redis_url: str) -> None:
    """Values that say their key, read by callers that go or run out of time: never another's, and few connections."""
    chance = random.Random(17)
    async with tcp_proxy(redis_server.port) as proxy:
        direct = RedisCache(redis_url)
        await direct.put_many([CacheItem(f"m:{i}", b"%d" % i, 600.0) for i in range(200)])
        through = plugins.cache(redis_url.replace(str(redis_server.port), str(proxy.port)))
        shared = Shared(through)
        outcomes = {"right": 0, "miss": 0, "cancelled": 0}

        async def read(i: int) -> None:
            (found,) = await shared.get_many([f"m:{i}"])
            assert found in {None, b"%d" % i}
            outcomes["miss" if found is None else "right"] += 1

        for turn in range(100):
            proxy.delay_s = chance.choice([0.0, 0.0, 0.002, 0.02])
            reading = [asyncio.create_task(read(chance.randrange(200))) for _ in range(100)]
            await asyncio.sleep(chance.choice([0.0, 0.001, 0.004]))
            for each in chance.sample(reading, 30):
                outcomes["cancelled"] += each.cancel()
            for task in reading:
                if not task.cancelled():
                    await asyncio.wait([task])
                    assert task.cancelled() or task.exception() is None
            if turn % 10 == 9:
                proxy.cut()
            shared._reading.succeeded()  # or the breaker would spare us the most of it
        assert sum(outcomes.values()) == 10_000
        assert outcomes["right"] > 300, outcomes
        assert outcomes["cancelled"] > 500, outcomes
        assert outcomes["miss"] > 1000, outcomes
        assert proxy.opened <= 30
        assert proxy.most <= 4
        await shared.close()
        await asyncio.gather(direct.close(), through.close())


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No full collection meanwhile: over all that the suite has imported it stops the loop for a second."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.redis
@pytest.mark.promise("P1")
@pytest.mark.parametrize("fault", ["stands still", "dies"])
async def test_a_redis_that_fails_in_the_middle_costs_milliseconds(
    own_redis: servers.RedisServer, registry: ms.Registry, tmp_path: Path, fault: str, uncollected: None
) -> None:
    """Every request is answered rightly, soon at the speed of no cache; when Redis is back, so is what it keeps."""
    numbers = itertools.count()
    async with (
        tcp_proxy(own_redis.port) as proxy,
        serve(registry, tmp_path, f"redis://127.0.0.1:{proxy.port}", timeout_ms=5000) as server,
    ):

        async def one(spent: list[float]) -> None:
            x, began = float(next(numbers)), time.monotonic()
            answer = await server.predict("m", {"x": [x]})
            spent.append(time.monotonic() - began)
            assert tells(answer.prediction, x) == 1

        async def crowd(turns: int) -> float:
            """Ask for what nobody asked for, 20 at a time; return how long most of them took at the longest."""
            spent: list[float] = []
            for _ in range(turns):
                await asyncio.gather(*(one(spent) for _ in range(20)))
            return sorted(spent)[int(0.95 * len(spent))]

        await crowd(20)
        before = proxy.opened
        own_redis.signal(signal.SIGSTOP) if fault == "stands still" else own_redis.kill()
        early, late = await crowd(100), await crowd(100)
        assert shared_by(server)._reading.open  # whoever comes now does not wait at all
        own_redis.signal(signal.SIGCONT) if fault == "stands still" else own_redis.start()
        assert max(early, late) < 0.5
        assert proxy.opened - before <= 20
        assert proxy.most <= 4
        await reads_again(server)


def shared_by(server: ms.AsyncModelServer) -> Shared:
    """Return what the server reads and writes the shared cache with."""
    assert server._require_running().predictions is not None
    shared = server._require_running().predictions._tiers._shared
    assert shared is not None
    return shared


async def reads_again(server: ms.AsyncModelServer) -> None:
    """Wait until an answer that only Redis has is given."""
    predictions = server._require_running().predictions
    assert predictions is not None
    async with asyncio.timeout(20):
        while True:
            await server.predict("m", {"x": [-1.0]})
            await asyncio.sleep(0.05)
            await predictions._tiers._local.clear("")
            if (await server.predict("m", {"x": [-1.0]})).cached:
                return


@pytest.mark.redis
async def test_a_server_closes_while_redis_stands_still(
    own_redis: servers.RedisServer, registry: ms.Registry, tmp_path: Path
) -> None:
    """What is on its way to a Redis that does not take it holds up the end by about a second."""
    async with tcp_proxy(own_redis.port) as proxy:
        server = serve(registry, tmp_path, f"redis://127.0.0.1:{proxy.port}")
        await server.start()
        await server.predict("m", {"x": [1.0]})
        own_redis.signal(signal.SIGSTOP)
        await asyncio.gather(*(server.predict("m", {"x": [float(i)]}) for i in range(50)))
        began = time.monotonic()
        await server.close()
        assert time.monotonic() - began < 3.0
        own_redis.signal(signal.SIGCONT)


@pytest.mark.redis
async def test_whoever_disconnects_leaves_the_others_their_answer(
    registry: ms.Registry, tmp_path: Path, redis_url: str
) -> None:
    """Of twenty callers with one question those who stay are answered, whoever asked first and goes; it is run once."""
    async with serve(registry, tmp_path, redis_url, max_wait_ms=50) as server:
        asking = [asyncio.create_task(server.predict("m", {"x": [7.0]})) for _ in range(20)]
        predictions = server._require_running().predictions
        assert predictions is not None
        async with asyncio.timeout(20):
            while not len(predictions._flights):  # noqa: ASYNC110  # what it waits for has no event
                await asyncio.sleep(0)
        for gone in asking[:10]:
            gone.cancel()
        answers = await asyncio.gather(*asking[10:])
        assert [tells(answer.prediction, 7.0) for answer in answers] == [1] * 10
        assert batches(server) == 1


@pytest.mark.redis
async def test_a_server_starts_while_redis_is_down(registry: ms.Registry, tmp_path: Path) -> None:
    """Without Redis a server starts, answers, and keeps what it computed in its memory."""
    async with serve(registry, tmp_path, f"redis://127.0.0.1:{servers.free_port()}") as server:
        answers = [await server.predict("m", {"x": [1.0]}) for _ in range(2)]
    assert [answer.cached for answer in answers] == [False, True]


@pytest.mark.redis
async def test_what_is_kept_is_json_for_anybody(
    redis_server: servers.RedisServer, registry: ms.Registry, tmp_path: Path, redis_url: str, kept: RedisCache
) -> None:
    """A value can be read by whoever looks: its form, its key, the prediction; and it ends by itself."""
    async with serve(registry, tmp_path, redis_url) as server:
        answer = await server.predict("m", {"x": [1.0]})
        await until_kept(kept, 1)
    with redis_py.Redis(port=redis_server.port) as client:
        ((name),) = client.keys(f"{kept._space}*")
        document = json.loads(client.get(name))
        assert document == {"modelserve": 1, "key": name.decode().removeprefix(kept._space), "value": answer.prediction}
        assert 0 < client.pttl(name) <= 60_000


# -- with features -----------------------------------------------------------------------------------------


Serve: TypeAlias = Callable[..., ms.AsyncModelServer]


@pytest.fixture
def scores(tmp_path: Path) -> ms.FeatureWriter:
    """A feature store in memory with the score 5 of user 1."""
    writer = ms.FeatureWriter("memory://")
    writer.put("user_id", 1, {"score": 5.0})
    return writer


@pytest.fixture
def serving_scores(tmp_path: Path, scores: ms.FeatureWriter) -> Serve:
    """What makes a server whose model adds the score of a user to what a request gives."""
    frame = pd.DataFrame({"x": [1.0, 2.0], "score": [10.0, 20.0]})
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    adder = FunctionTransformer(np.sum, kw_args={"axis": 1})
    registry.register("sum", "1", adder, example=frame, method="transform", trusted=["numpy.sum"])
    registry.promote("sum", "1")

    def serve(cache_key: str, cache: Any = None, **declared: Any) -> ms.AsyncModelServer:
        features = ms.Features("user_id", ["score"], **{"defaults": {"score": 0.0}} | declared)
        models = {"sum": ms.ModelOptions(cache_ttl_s=60, cache_key=cache_key, features=features, log_sample_rate=1.0)}  # type: ignore[arg-type]
        return ms.AsyncModelServer(
            registry, models, cache_dir=tmp_path / "cache", poll_s=3600, cache=cache, features=scores.store
        )

    return serve


def told(*answers: ms.Prediction) -> list[tuple[Any, bool]]:
    return [(each.prediction, each.cached) for each in answers]


async def test_by_request_the_features_of_a_hit_are_not_read(serving_scores: Serve, scores: ms.FeatureWriter) -> None:
    """The answer to a request that was asked before comes from the cache whatever its features are by now."""
    read: list[Any] = []
    async with serving_scores("request") as server:
        server.observe(lambda event: read.append(event) if isinstance(event, FeaturesRead) else None)
        first = await server.predict("sum", {"x": 1.0, "user_id": 1})
        scores.put("user_id", 1, {"score": 50.0})
        again = await server.predict("sum", {"user_id": "1", "x": 1})
        other = await server.predict("sum", {"x": 2.0, "user_id": 1})
    assert told(first, again, other) == [
        (6.0, False),
        (6.0, True),
        (52.0, False),
    ]
    assert len(read) == 2


async def test_merged_the_features_of_now_count(serving_scores: Serve, scores: ms.FeatureWriter) -> None:
    """By default the same request with another feature is another input, and with the same features it is known."""
    async with serving_scores("merged") as server:
        first = await server.predict("sum", {"x": 1.0, "user_id": 1})
        again = await server.predict("sum", {"x": 1.0, "user_id": 1})
        scores.put("user_id", 1, {"score": 50.0})
        changed = await server.predict("sum", {"x": 1.0, "user_id": 1})
    assert told(first, again, changed) == [
        (6.0, False),
        (6.0, True),
        (51.0, False),
    ]


async def test_by_request_some_rows_of_several_are_known(serving_scores: Serve, scores: ms.FeatureWriter) -> None:
    """Of several rows those that were asked before keep their answer, the others run; errors name the right row."""
    async with serving_scores("request", defaults={}) as server:
        await server.predict("sum", {"x": 1.0, "user_id": 1})
        scores.put("user_id", 1, {"score": 50.0})
        rows = [{"x": x, "user_id": 1} for x in (2.0, 1.0)]
        many = await server.predict_many("sum", rows)
        assert told(*many) == [(52.0, False), (6.0, True)]
        with pytest.raises(InvalidInput, match=r"instances\[1\]\.user_id"):
            await server.predict_many("sum", [rows[1], {"x": 1.0, "user_id": 2}])


async def test_by_request_what_is_known_needs_no_features_beside_what_is_not(
    serving_scores: Serve, scores: ms.FeatureWriter
) -> None:
    """A known row is answered in a request of several as it is alone, also when its features are gone by now."""
    async with serving_scores("request", defaults={}) as server:
        await server.predict("sum", {"x": 1.0, "user_id": 1})
        scores.put("user_id", 1, {"other": 0.0})
        scores.put("user_id", 2, {"score": 7.0})
        many = await server.predict_many("sum", [{"x": 1.0, "user_id": user} for user in (1, 2)])
    assert told(*many) == [(6.0, True), (8.0, False)]


async def test_what_is_declared_of_features_is_part_of_the_request(
    serving_scores: Serve, scores: ms.FeatureWriter
) -> None:
    """Under another age limit an answer that is kept is not given: its features may be too old."""
    kept = MemoryCache()
    async with serving_scores("request", cache=kept) as server:
        await server.predict("sum", {"x": 1.0, "user_id": 1})
    async with serving_scores("request", cache=kept, max_age_s=60) as server:
        assert not (await server.predict("sum", {"x": 1.0, "user_id": 1})).cached
    async with serving_scores("request", cache=kept) as server:
        assert (await server.predict("sum", {"x": 1.0, "user_id": 1})).cached


async def test_a_degraded_row_costs_the_others_no_hit(serving_scores: Serve) -> None:
    """Of several rows the degraded ones alone go past the cache, and are counted as such."""
    async with serving_scores("merged") as server:
        for hit in (False, True):
            many = await server.predict_many("sum", [{"x": 1.0, "user_id": user} for user in (1, 2, 1)])
            assert told(*many) == [(6.0, hit), (1.0, False), (6.0, hit)]
            assert [each.degraded for each in many] == [(), ("score",), ()]
        text = (await server.metrics() or b"").decode()
    assert 'modelserve_cache_requests_total{model="sum",result="bypass"} 2' in text


async def test_by_request_no_degraded_answer_is_kept(serving_scores: Serve, scores: ms.FeatureWriter) -> None:
    """An answer with a default in it is not given again: the next request reads what has come meanwhile."""
    async with serving_scores("request") as server:
        first = await server.predict("sum", {"x": 1.0, "user_id": 2})
        scores.put("user_id", 2, {"score": 3.0})
        second = await server.predict("sum", {"x": 1.0, "user_id": 2})
    assert (first.prediction, first.degraded) == (1.0, ("score",))
    assert (second.prediction, second.degraded, second.cached) == (4.0, (), False)


async def test_by_request_what_a_request_gives_itself_counts(
    serving_scores: Serve,
) -> None:
    """A request that overrides a feature is not the one that does not, nor one that gives another value."""
    async with serving_scores("request", overridable=True) as server:
        requests = [{"x": 1.0, "user_id": 1} | given for given in ({}, {"score": 7}, {"score": 8.0}, {"score": 7.0})]
        answers = [await server.predict("sum", each) for each in requests]
    assert told(*answers) == [
        (6.0, False),
        (8.0, False),
        (9.0, False),
        (8.0, True),
    ]


async def test_by_request_a_hit_is_logged_without_inputs(serving_scores: Serve, tmp_path: Path) -> None:
    """The log keeps the answer and that it was known; what the features were then is not known any more."""
    async with serving_scores("request") as server:
        for _ in range(2):
            await server.predict("sum", {"x": 1.0, "user_id": 1})
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry, registry.inference_log() as log:
        (batch,) = log.read("sum")
    assert batch["prediction"] == [6.0, 6.0]
    assert batch["cached"].tolist() == [False, True]
    assert batch["inputs"] == [{"x": 1.0, "score": 5.0}, None]
    assert [value is None for value in batch["input_hash"]] == [False, True]
