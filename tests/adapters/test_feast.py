"""Feast: the reading contract over a real repository with its SQLite store, and what is special about it."""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib.util
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import modelserve as ms
from modelserve.adapters.features.feast import FeastFeatures
from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow, FeatureStore, NoValue, OpenedAhead
from modelserve.testing.features import FeatureReadingContract, read
from tests import servers
from tests.adapters.feast_repository import CONFIGURATION, Repository

LONG_AGO = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
ROW = FeatureKey("spending", "7", ("spend", "visits"))
MISSING = (NoValue.MISSING, NoValue.MISSING)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A Feast repository that describes nothing yet."""
    if importlib.util.find_spec("feast") is None:
        servers.unavailable("no Feast; pip install 'modelserve[feast]'")
    return Repository(tmp_path / "repository")


@pytest.fixture
def spending(repository: Repository) -> Repository:
    """A repository with a view of two features by a number, and a row for 7."""
    user = repository.entity("user_id", "INT64")
    options = {"ttl": dt.timedelta(seconds=1)}  # long over for every row here
    repository.apply(user, repository.view("spending", [user], {"spend": 1.0, "visits": 1}, **options))
    repository.publish("spending", [{"user_id": 7, "spend": 12.5, "visits": 3}], LONG_AGO)
    return repository


@pytest.fixture
async def store(spending: Repository) -> AsyncIterator[FeastFeatures]:
    """Reads the view of spending."""
    store = FeastFeatures(spending.url)
    yield store
    await store.close()


async def values(store: FeatureStore, *wanted: FeatureKey) -> list[tuple[Any, ...]]:
    return [found for found, _ in await read(store, *wanted)]


class TestFeast(FeatureReadingContract):
    @pytest.fixture
    async def store(self, repository: Repository) -> AsyncIterator[FeatureStore]:
        user, item = repository.entity("user"), repository.entity("item")
        views = [
            repository.view(name, [entity], self.schema) for name, entity in (("user_id", user), ("item_id", item))
        ]
        repository.apply(user, item, *views)
        self.repository = repository
        store = FeastFeatures(repository.url)
        yield store
        await store.close()

    async def publish(self, store: FeatureStore, records: Sequence[FeatureRecord]) -> None:
        """Publish with Feast: the adapter reads only."""
        await asyncio.to_thread(self.repository.put, records)


# -- what is read ------------------------------------------------------------------------------------------


async def test_an_old_row_has_its_time_and_leaves_the_verdict_to_the_model(store: FeastFeatures) -> None:
    """A row whose ttl in Feast is over is read with the time it is of, against which ``max_age_s`` is held."""
    assert await read(store, ROW) == [FeatureRow((12.5, 3), LONG_AGO.timestamp())]


async def test_a_null_is_told_from_a_row_that_is_not_there(spending: Repository, store: FeastFeatures) -> None:
    """Null and NaN were published by somebody, at some time; for an entity that nobody published there is no time."""
    rows: list[dict[str, Any]] = [
        {"user_id": 8, "spend": None, "visits": 3},
        {"user_id": 9, "spend": float("nan"), "visits": 4},
    ]
    spending.publish("spending", rows, LONG_AGO)
    keys = [ROW._replace(key=key) for key in ("8", "9", "10")]
    assert await values(store, *keys) == [(None, 3), (None, 4), MISSING]


async def test_keys_are_numbers_where_feast_has_numbers(store: FeastFeatures) -> None:
    """A key that no row can have is a missing row, and does not keep the others of the read from being there."""
    odd = ["007", "seven", "7.0", " 7", "\N{ARABIC-INDIC DIGIT SEVEN}", str(2**63), "-0", "9" * 500]
    found = await values(store, *(ROW._replace(key=key) for key in ("7", *odd, "7")))
    assert found == [(12.5, 3), *[MISSING] * len(odd), (12.5, 3)]
    assert await values(store, ROW._replace(key="seven")) == [MISSING]


async def test_small_numbers_as_keys(repository: Repository) -> None:
    """A key of 32 bits takes what fits into them."""
    user = repository.entity("user_id", "INT32")
    repository.apply(user, repository.view("spending", [user], {"spend": 1.0, "visits": 1}))
    store = FeastFeatures(repository.url)
    found = await values(store, ROW._replace(key=str(2**31)), ROW._replace(key=str(2**31 - 1)))
    assert found == [MISSING, MISSING]
    await store.close()


async def test_a_feature_service_is_a_group(repository: Repository) -> None:
    """Features of several views come as one row, which is as old as the oldest of those that are there."""
    user = repository.entity("user_id", "INT64")
    spending = repository.view("spending", [user], {"spend": 1.0})
    visits = repository.view("visiting", [user], {"visits": 1, "other": 1})
    service = repository.feast.FeatureService(name="checkout", features=[spending, visits[["visits"]]])
    repository.apply(user, spending, visits, service)
    later = LONG_AGO + dt.timedelta(days=3)
    repository.publish("spending", [{"user_id": 7, "spend": 12.5}], later)
    repository.publish("visiting", [{"user_id": 7, "visits": 3, "other": 0}], LONG_AGO)
    repository.publish("spending", [{"user_id": 8, "spend": 2.5}], later)
    store = FeastFeatures(repository.url)
    both, one = await read(store, FeatureKey("checkout", "7", ROW.names), FeatureKey("checkout", "8", ROW.names))
    assert both == FeatureRow((12.5, 3), LONG_AGO.timestamp())
    assert one == FeatureRow((2.5, NoValue.MISSING), later.timestamp())
    with pytest.raises(ConfigError, match="'checkout' has no feature 'other'; it has spend, visits"):
        await store.open([("checkout", ("other",))])
    await store.close()


async def test_the_registry_is_asked_once(store: FeastFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first read of some features nothing is looked up any more."""
    await store.open([(ROW.group, ROW.names)])
    for name in ("get_any_feature_view", "get_entity", "list_entities", "list_all_feature_views"):
        monkeypatch.setattr(store._store.registry, name, None)
    assert await values(store, ROW) == [(12.5, 3)]


@pytest.mark.parametrize(
    ("registry", "kept_s"), [("registry.db", 0), ("{path: registry.db, cache_ttl_seconds: 60}", 60)]
)
async def test_the_registry_is_kept_unless_its_file_says_for_how_long(
    spending: Repository, registry: str, kept_s: int
) -> None:
    """Nobody's request reads the registry again, and its outage is nobody's, as long as nothing else is asked for."""
    file = spending.folder / "feature_store.yaml"
    file.write_text(CONFIGURATION.replace("registry.db", registry))
    store = FeastFeatures(spending.url)
    assert await values(store, ROW) == [(12.5, 3)]
    assert store._store.registry.cached_registry_proto_ttl == dt.timedelta(seconds=kept_s)
    await store.close()


# -- what cannot be read -----------------------------------------------------------------------------------


@pytest.fixture
def odd_repository(repository: Repository) -> Repository:
    """A repository with views that cannot be read by one key, and features that no model takes."""
    user, item = repository.entity("user_id", "INT64"), repository.entity("item_id")
    price = repository.entity("price", "DOUBLE")
    feast, types = repository.feast, repository.types
    spending = repository.view("spending", [user], {"spend": 1.0, "seen_at": types.UnixTimestamp})
    other = repository.view("other", [user], {"spend": 1.0})
    by_item = repository.view("by_item", [item], {"stock": 1})
    on_demand = feast.OnDemandFeatureView(
        name="on_demand",
        sources=[spending],
        schema=[feast.Field(name="twice", dtype=types.Float64)],
        feature_transformation=feast.transformation.python_transformation.PythonTransformation(
            udf=lambda inputs: {"twice": [2 * each for each in inputs["spend"]]}, udf_string=""
        ),
        mode="python",
    )
    repository.apply(
        *(user, item, price, spending, other, by_item, on_demand),
        repository.view("pairs", [user, item], {"spend": 1.0}),
        repository.view("nobodys", [], {"spend": 1.0}),
        repository.view("by_price", [price], {"spend": 1.0}),
        repository.view("offline", [user], {"spend": 1.0}, online=False),
        feast.FeatureService(name="ambiguous", features=[spending[["spend"]], other]),
        feast.FeatureService(name="torn", features=[spending[["spend"]], by_item]),
        feast.FeatureService(name="renamed", features=[spending.with_name("costs")]),
    )
    return repository


@pytest.mark.filterwarnings("ignore:On demand feature view is an experimental feature:RuntimeWarning")
@pytest.mark.parametrize(
    ("group", "names", "problem"),
    [
        ("spendings", ["spend"], "project 'shop' has neither .* nor a feature service 'spendings'; it has ambiguous, "),
        ("spending", ["spent"], "the feature view 'spending' has no feature 'spent'; it has seen_at, spend"),
        ("spending", ["seen_at"], "'seen_at' of the feature view 'spending' is of Feast's type UNIX_TIMESTAMP"),
        ("pairs", ["spend"], r"'pairs' is read by 2 join keys \(item_id, user_id\)"),
        ("nobodys", ["spend"], r"'nobodys' is read by 0 join keys \(none\)"),
        ("by_price", ["spend"], "'by_price' has the join key 'price' of type DOUBLE"),
        ("offline", ["spend"], "'offline' has online=False"),
        ("on_demand", ["twice"], "'on_demand' is a OnDemandFeatureView; only what is stored"),
        ("ambiguous", ["spend"], "'ambiguous' has the feature 'spend' of spending and other"),
        ("torn", ["spend", "stock"], r"no one join key, but item_id \(STRING\) and user_id \(INT64\)"),
        ("renamed", ["spend"], "'renamed' renames the feature view 'spending'"),
    ],
)
async def test_what_can_never_be_read_is_named(
    odd_repository: Repository, group: str, names: list[str], problem: str
) -> None:
    """Opened with a mistake in a declaration, it says which view and which feature; a read says the same."""
    store = FeastFeatures(odd_repository.url)
    assert isinstance(store, OpenedAhead)
    with pytest.raises(ConfigError, match=problem):
        await store.open([(group, tuple(names))])
    with pytest.raises(BackendUnavailable, match=problem):
        await store.read([FeatureKey(group, "1", tuple(names))], 20.0)
    await asyncio.to_thread(store.ping)
    await store.close()


async def test_a_wrong_group_fails_alone(store: FeastFeatures) -> None:
    """One model's mistake is no error for the others, whose rows are read together with its."""
    fine, wrong = await store.read([ROW, FeatureKey("nowhere", "7", ("spend",))], 20.0)
    assert isinstance(fine, FeatureRow)
    assert isinstance(wrong, BackendUnavailable)


@pytest.mark.parametrize(
    ("configuration", "problem"),
    [
        (None, "there is no feature_store.yaml in /"),
        ("password: [secret", "is none that Feast takes"),
        ("", "is none that Feast takes"),
        (CONFIGURATION.replace("type: sqlite", "password: secret\n  type: [secret]"), "is none that Feast takes"),
        (CONFIGURATION.replace("sqlite\n  path: online.db", "hazelcast"), "needs a package that is not installed"),
    ],
)
async def test_a_repository_that_cannot_be_opened(
    repository: Repository, configuration: str | None, problem: str
) -> None:
    """What is wrong with feature_store.yaml is said without what is in it, when opened, read and pinged."""
    file = repository.folder / "feature_store.yaml"
    file.unlink() if configuration is None else file.write_text(configuration)
    store = FeastFeatures(repository.url)
    with pytest.raises(ConfigError, match=problem) as refused:
        await store.open([])
    assert "secret" not in str(refused.value)
    with pytest.raises(BackendUnavailable, match=problem):
        await store.read([ROW], 20.0)
    with pytest.raises(BackendUnavailable, match=problem):
        await asyncio.to_thread(store.ping)
    await store.close()


async def test_a_repository_without_views_can_be_pinged(repository: Repository) -> None:
    """Where nothing can be read the registry alone has to answer."""
    store = FeastFeatures(repository.url)
    await asyncio.to_thread(store.ping)
    assert await store.read([], 1.0) == []
    await store.close()


async def test_a_store_that_fails_is_read_again(spending: Repository, store: FeastFeatures) -> None:
    """While Feast's online store has no table for the view reads fail without its words, and then they work again."""
    await read(store, ROW)
    with sqlite3.connect(spending.folder / "online.db") as database:
        database.execute("ALTER TABLE shop_spending RENAME TO secret")
    for _ in range(2):
        with pytest.raises(BackendUnavailable) as refused:
            await store.read([ROW], 1.0)
        assert str(refused.value) == "Feast is unavailable: its SDK failed (OperationalError)"
    with pytest.raises(BackendUnavailable, match="OperationalError"):
        await asyncio.to_thread(store.ping)
    with database:
        database.execute("ALTER TABLE secret RENAME TO shop_spending")
    database.close()
    assert await values(store, ROW) == [(12.5, 3)]


def test_publishing_is_left_to_feast(spending: Repository) -> None:
    """A writer of a ``feast://`` URL says how to publish, and can read a row back."""
    with ms.FeatureWriter(spending.url) as writer:
        with pytest.raises(ConfigError, match="Feast is read only; publish with Feast itself: feast materialize"):
            writer.put("spending", 7, {"spend": 1.0})
        assert writer.get("spending", 7, ["spend"]) == FeatureRow((12.5,), LONG_AGO.timestamp())


# -- threads -----------------------------------------------------------------------------------------------


class Stalled:
    """The SDK's store, over connections that stand still until let go."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls = 0
        self.go_on = threading.Event()

    def get_online_features(self, **request: Any) -> Any:
        self.calls += 1
        assert self.go_on.wait(20)
        return self._store.get_online_features(**request)

    async def close(self) -> None:
        await self._store.close()


async def test_a_call_that_hangs_is_left_behind(store: FeastFeatures, no_blocking: None) -> None:
    """A read ends after a second whatever the SDK does; what found no thread in time is not asked for later."""
    await read(store, ROW)
    stalled = store._store = Stalled(store._store)
    began = time.monotonic()
    reads = [store.read([ROW], 0.9) for _ in range(12)]
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert 0.9 < time.monotonic() - began < 5
    assert {str(error) for error in found} == {"Feast is unavailable: it does not answer in time"}
    late = [asyncio.ensure_future(store.read([ROW], 0.01)) for _ in range(3)]
    await asyncio.sleep(0.2)
    stalled.go_on.set()
    for read_late in late:
        with pytest.raises(BackendUnavailable, match="no thread was free in time"):
            await read_late
    assert stalled.calls == 8
    assert await values(store, ROW) == [(12.5, 3)]


async def test_a_slow_group_keeps_no_other_waiting_for_ever(store: FeastFeatures) -> None:
    """Of a read of two groups, the one that answers is there, and the one that hangs is an error."""
    other = ROW._replace(names=("spend",))
    await read(store, ROW, other)

    class HalfStalled(Stalled):
        def get_online_features(self, **request: Any) -> Any:
            if len(request["features"]) == 1:
                return self._store.get_online_features(**request)
            return super().get_online_features(**request)

    stalled = store._store = HalfStalled(store._store)
    hanging, fine = await store.read([ROW, other], 0.5)
    stalled.go_on.set()
    assert isinstance(hanging, BackendUnavailable)
    assert isinstance(fine, FeatureRow)


async def test_a_read_that_is_closed_under_way_is_an_error(store: FeastFeatures) -> None:
    """A read that waits for a thread when the store is closed is told so."""
    await read(store, ROW)
    stalled = store._store = Stalled(store._store)
    reads = [asyncio.ensure_future(store.read([ROW], 5.0)) for _ in range(9)]
    await asyncio.sleep(0.1)
    await store.close()
    stalled.go_on.set()
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert [str(each) for each in found if isinstance(each, Exception)] == ["Feast is unavailable: it was closed"]


async def test_the_threads_are_few_and_end(store: FeastFeatures) -> None:
    """However many reads run at once, there are at most eight threads, and none after closing."""
    await asyncio.gather(*(read(store, ROW) for _ in range(30)))
    assert store._threads is not None
    ours = list(store._threads._threads)
    assert 0 < len(ours) <= 8
    assert all(thread.name.startswith("modelserve-features") for thread in ours)
    await store.close()
    for thread in ours:
        thread.join(20)
    assert not any(thread.is_alive() for thread in ours)


# -- in a server -------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with a model that adds up an input from a request and two from Feast."""
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415  # a second to import

    frame = pd.DataFrame({"hour": [1.0, 2.0, 3.0, 7.0], "visits": [3, 1, 2, 0], "spend": [1.0, 5.0, 2.0, 0.5]})
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", LinearRegression().fit(frame, frame.sum(axis=1)), example=frame)
    registry.promote("m", "1")
    return registry


def options(**changes: Any) -> dict[str, ms.ModelOptions]:
    declared = {"entity": "user_id", "names": ["visits", "spend"], "group": "spending", "budget_ms": 2000, **changes}
    return {"m": ms.ModelOptions(features=ms.Features(**declared))}


async def test_a_server_predicts_with_what_feast_has(
    spending: Repository, registry: ms.Registry, tmp_path: Path, no_blocking: None
) -> None:
    """A model's features are Feast's, from the first request on, and nothing of it happens on the event loop."""
    models = options(defaults={"visits": 0, "spend": 0.0})
    async with ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache", features=spending.url) as server:
        there = await server.predict("m", {"hour": 1.0, "user_id": 7})
        nobody = await server.predict("m", {"hour": 1.0, "user_id": 8})
    assert there.prediction == pytest.approx(1.0 + 3 + 12.5)
    assert there.degraded == ()
    assert nobody.prediction == pytest.approx(1.0)
    assert nobody.degraded == ("visits", "spend")
    registry.close()


async def test_a_server_does_not_start_with_features_that_feast_lacks(
    spending: Repository, registry: ms.Registry, tmp_path: Path
) -> None:
    """A misspelt feature is found when the server starts, not by the requests."""
    models = options(group=None)
    server = ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache", features=spending.url)
    with pytest.raises(ConfigError, match="nor a feature service 'user_id'; it has spending"):
        await server.start()
    await server.close()
    registry.close()
