"""Feature stores: the contract over memory, a real Redis and DynamoDB's protocol, and what is special about each."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import boto3
import pytest
import redis as redis_py
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)

from modelserve import plugins
from modelserve.adapters.features import dynamodb
from modelserve.adapters.features.dynamodb import DynamoDbFeatures
from modelserve.adapters.features.memory import MemoryFeatures
from modelserve.adapters.features.redis import RedisFeatures
from modelserve.errors import BackendUnavailable, ConfigError, MissingDependency
from modelserve.ports import FeatureKey, FeatureRow, FeatureStore, NoValue
from modelserve.testing.features import FeatureStoreContract, read, record
from tests import servers

ROW = FeatureKey("user_id", "1", ("a", "b"))


@pytest.fixture
def table(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty table."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dynamodb, "_LIMIT_S", 20.0)  # a machine that halts for a second is no finding
    name = f"features-{uuid.uuid4().hex}"
    client = boto3.client("dynamodb", endpoint_url=s3_server, region_name="us-east-1")
    client.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": "_id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "_id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    yield f"dynamodb://{name}?region=us-east-1&endpoint={s3_server}"
    client.delete_table(TableName=name)
    client.close()


async def opened(url: str) -> AsyncIterator[FeatureStore]:
    store = plugins.features(url)
    yield store
    await store.close()


class TestMemory(FeatureStoreContract):
    @pytest.fixture
    def store(self) -> FeatureStore:
        return plugins.features("memory://")


class TestRedis(FeatureStoreContract):
    @pytest.fixture
    async def store(self, redis_url: str) -> AsyncIterator[FeatureStore]:
        async for store in opened(redis_url):
            yield store


@pytest.mark.aws
class TestDynamoDb(FeatureStoreContract):
    @pytest.fixture
    async def store(self, table: str) -> AsyncIterator[FeatureStore]:
        async for store in opened(table):
            yield store


# -- Redis -------------------------------------------------------------------------------------------------


@pytest.fixture
async def redis_store(redis_url: str) -> AsyncIterator[RedisFeatures]:
    """A store in the shared Redis, with a prefix of its own."""
    store = RedisFeatures(redis_url)
    yield store
    await store.close()


async def test_rows_that_others_wrote_are_read(redis_store: RedisFeatures, redis_server: servers.RedisServer) -> None:
    """A hash from any program is a row: JSON is a value, other bytes are unreadable, and a time may be wanting."""
    name = f"{redis_store._root}user_id:1"
    with redis_py.Redis(port=redis_server.port) as client:
        client.hset(name, mapping={"a": "12.5", "b": b"\xff\x00"})
        assert await read(redis_store, ROW) == [FeatureRow((12.5, NoValue.UNREADABLE), None)]
        for odd in ("soon", "nan", "inf", ""):
            client.hset(name, "_ts", odd)
            assert (await read(redis_store, ROW))[0].written_at is None


async def test_a_key_of_another_type_fails_alone(redis_store: RedisFeatures, redis_server: servers.RedisServer) -> None:
    """Where a string is in the place of a hash, that row is an error, and the others of the read are there."""
    with redis_py.Redis(port=redis_server.port) as client:
        client.set(f"{redis_store._root}user_id:1", "a string")
    await asyncio.to_thread(redis_store.write, [record("2", {"a": 2})])
    broken, fine = await redis_store.read([ROW, FeatureKey("user_id", "2", ("a",))], 1.0)
    assert isinstance(broken, BackendUnavailable)
    assert str(broken) == "Redis is unavailable: it refuses the command"
    assert isinstance(fine, FeatureRow)
    assert fine.values == (2,)


@pytest.mark.redis
async def test_a_stalled_redis_is_given_up_after_a_second(own_redis: servers.RedisServer) -> None:
    """A read of a Redis that stands still ends by itself, and the next one works once it goes on."""
    store = RedisFeatures(own_redis.url)
    await read(store, ROW)
    own_redis.signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(BackendUnavailable, match="does not answer in time"):
            await store.read([ROW], 0.005)
    finally:
        own_redis.signal(signal.SIGCONT)
    assert time.monotonic() - began < 3
    await read(store, ROW)
    await store.close()


@pytest.mark.redis
async def test_a_read_that_was_cut_off_leaves_no_answer_behind(own_redis: servers.RedisServer) -> None:
    """What comes late for a read that was cancelled on its way is not taken for the next one's answer."""
    store = RedisFeatures(own_redis.url)
    await asyncio.to_thread(store.write, [record(str(i), {"a": i, "b": i}) for i in range(1, 9)])
    await read(store, ROW)
    for i in range(2, 9):
        own_redis.signal(signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await store.read([ROW, ROW], 0.005)
        finally:
            own_redis.signal(signal.SIGCONT)
        assert [row.values for row in await read(store, FeatureKey("user_id", str(i), ("b", "a")))] == [(i, i)]
    await store.close()


@pytest.mark.redis
async def test_a_redis_that_was_restarted_is_read_again(own_redis: servers.RedisServer) -> None:
    """While it is gone reads fail without host or user in the error; when it is back they work."""
    store = RedisFeatures(own_redis.url)
    await read(store, ROW)
    own_redis.kill()
    with pytest.raises(BackendUnavailable) as refused:
        await store.read([ROW], 0.005)
    assert str(refused.value) == "Redis is unavailable: no connection"
    await asyncio.to_thread(own_redis.start)
    await read(store, ROW)
    await store.close()


# -- DynamoDB ----------------------------------------------------------------------------------------------


class Throttled:
    """A client of DynamoDB that leaves out some of what it is asked for, the first few times."""

    def __init__(self, client: Any, times: int) -> None:
        self._client = client
        self.left = times
        self.calls = 0

    def batch_get_item(self, RequestItems: Any) -> Any:  # noqa: N803  # boto3's name
        self.calls += 1
        ((table, asked),) = RequestItems.items()
        keys = asked["Keys"]
        if self.left <= 0:
            return self._client.batch_get_item(RequestItems=RequestItems)
        self.left -= 1
        answer = {"Responses": {table: []}, "UnprocessedKeys": {table: {"Keys": keys[1:] or keys}}}
        if len(keys) > 1:
            answer |= self._client.batch_get_item(RequestItems={table: {"Keys": keys[:1]}})
            answer["UnprocessedKeys"] = {table: {"Keys": keys[1:]}}
        return answer

    def batch_write_item(self, RequestItems: Any) -> Any:  # noqa: N803  # boto3's name
        self.calls += 1
        if self.left <= 0:
            return self._client.batch_write_item(RequestItems=RequestItems)
        self.left -= 1
        ((table, puts),) = RequestItems.items()
        self._client.batch_write_item(RequestItems={table: puts[:1]})
        return {"UnprocessedItems": {table: puts[1:]}}

    def close(self) -> None:
        self._client.close()


@pytest.mark.aws
async def test_what_was_left_out_is_asked_for_again(table: str) -> None:
    """Keys that DynamoDB did not process are read, and items written, by further requests, within the time given."""
    store = DynamoDbFeatures(table)
    throttled = store._client = Throttled(store._client, 2)
    await asyncio.to_thread(store.write, [record(str(i), {"a": i}) for i in range(5)])
    assert throttled.calls == 3
    throttled.left = 3
    found = await read(store, *(FeatureKey("user_id", str(i), ("a",)) for i in range(5)))
    assert [row.values for row in found] == [(i,) for i in range(5)]
    assert throttled.calls == 7
    await store.close()


@pytest.mark.aws
async def test_what_stays_left_out_is_no_missing_row(table: str) -> None:
    """A row that was throttled until the time was over is an error of its own; what was read is there."""
    store = DynamoDbFeatures(table)
    await asyncio.to_thread(store.write, [record(str(i), {"a": i}) for i in range(2)])
    store._client = Throttled(store._client, 10**6)
    began = time.monotonic()
    first, second = await store.read([FeatureKey("user_id", str(i), ("a",)) for i in range(2)], 0.05)
    assert time.monotonic() - began < 2
    assert isinstance(first, FeatureRow)
    assert first.values == (0,)
    assert isinstance(second, BackendUnavailable)
    assert "no capacity" in str(second)
    await store.close()


@pytest.mark.aws
async def test_a_write_that_is_never_taken_is_an_error(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Throttled for longer than a write may take, it says so instead of dropping rows."""
    monkeypatch.setattr(dynamodb, "_WRITE_LIMIT_S", 0.02)
    store = DynamoDbFeatures(table)
    store._client = Throttled(store._client, 10**6)
    with pytest.raises(BackendUnavailable, match="did not take every row"):
        await asyncio.to_thread(store.write, [record(str(i), {"a": i}) for i in range(30)])
    await store.close()


class Failing:
    """DynamoDB, failing with these errors before each write that it takes."""

    def __init__(self, client: Any, *errors: Exception) -> None:
        self._client = client
        self._errors = list(errors)

    def batch_write_item(self, RequestItems: Any) -> Any:  # noqa: N803  # boto3's name
        if self._errors:
            raise self._errors.pop(0)
        return self._client.batch_write_item(RequestItems=RequestItems)

    def close(self) -> None:
        self._client.close()


def refusal(code: str, status: int = 400) -> Any:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "BatchWriteItem")


@pytest.mark.aws
async def test_a_write_that_came_to_nothing_is_tried_again(table: str) -> None:
    """Too little capacity, an error of the server's and a connection that breaks off cost a training job nothing."""
    store = DynamoDbFeatures(table)
    broken = (ReadTimeoutError(endpoint_url=""), ConnectionClosedError(endpoint_url=""))
    busy = (refusal("ProvisionedThroughputExceededException"), refusal("InternalServerError", 500))
    store._client = Failing(store._client, *broken, *busy)
    await asyncio.to_thread(store.write, [record("1", {"a": 1})])
    store._client = store._client._client
    assert [row.values for row in await read(store, FeatureKey("user_id", "1", ("a",)))] == [(1,)]
    await store.close()


@pytest.mark.aws
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refusal("AccessDeniedException"), "it refuses the credentials"),
        (refusal("ValidationException"), "it refuses the request"),
        (EndpointConnectionError(endpoint_url=""), "no connection"),
        (NoCredentialsError(), "there are no credentials"),
    ],
)
async def test_a_write_that_is_refused_is_told_at_once(table: str, error: Exception, said: str) -> None:
    """What no second attempt would change is an error after the first."""
    store = DynamoDbFeatures(table)
    failing = store._client = Failing(store._client, error, error)
    with pytest.raises(BackendUnavailable, match=said):
        await asyncio.to_thread(store.write, [record("1", {"a": 1})])
    assert failing._errors == [error]
    await store.close()


@pytest.mark.aws
async def test_attributes_that_others_wrote(table: str) -> None:
    """A number of DynamoDB's own is unreadable, not a wrong value."""
    store = DynamoDbFeatures(table)
    store._client.put_item(TableName=store._table, Item={"_id": {"S": "user_id:1"}, "a": {"N": "1"}, "b": {"S": "2"}})
    assert await read(store, ROW) == [FeatureRow((NoValue.UNREADABLE, 2), None)]
    await store.close()


@pytest.mark.aws
async def test_a_table_that_is_not_there_is_named(table: str) -> None:
    """The error of a wrong table says which, and nothing of the driver's."""
    store = DynamoDbFeatures(table.replace("features-", "nowhere-"))
    with pytest.raises(BackendUnavailable, match="there is no table 'nowhere-"):
        await store.read([ROW], 1.0)
    with pytest.raises(BackendUnavailable, match="there is no table"):
        await asyncio.to_thread(store.ping)
    await store.close()


@pytest.mark.aws
async def test_the_threads_are_few_and_end(table: str) -> None:
    """However many reads run at once, there are at most eight threads, and none after closing."""
    store = DynamoDbFeatures(table)
    await asyncio.gather(*(read(store, ROW) for _ in range(30)))
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("modelserve-features")]
    assert 0 < len(ours) <= 8
    await store.close()
    for thread in ours:
        thread.join(20)
    assert not any(thread.is_alive() for thread in ours)


# -- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "kafka://host",
        "",
        "redis",
        "redis://host:notaport",
        "redis://host?nonsense=1",
        "redis://me:%secret@host:x",
        "dynamodb://",
        "dynamodb://table?colour=red",
        "dynamodb://table/secret?region=a",
        "dynamodb://table?region=us-east-1&endpoint=secret",
        "feast://",
        "feast://secret/repository",
        "feast:///repository?password=secret",
        "memory://name",
    ],
)
def test_a_url_that_cannot_be_read_is_a_config_error(url: str) -> None:
    """The error says how it is written, and quotes no secret."""
    with pytest.raises(ConfigError) as refused:
        plugins.features(url)
    assert "secret" not in str(refused.value)
    assert "features" in str(refused.value)


@pytest.mark.parametrize(
    ("url", "driver", "extra"),
    [("redis://host", "redis", "redis"), ("dynamodb://t", "boto3", "aws"), ("feast:///repository", "feast", "feast")],
)
def test_a_missing_driver_answers_with_its_install_line(
    url: str, driver: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for without its driver, a store names the extra that brings it."""
    for name in list(sys.modules):
        if name == driver or name.startswith(f"{driver}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(MissingDependency, match=rf"pip install 'modelserve\[{extra}\]'"):
        plugins.features(url)


async def test_nobody_there_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer is ``BackendUnavailable``, to a read, a write and a ping, without host or user in it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "someone")
    port = servers.free_port()
    urls = (f"redis://someone@127.0.0.1:{port}", f"dynamodb://t?region=us-east-1&endpoint=http://127.0.0.1:{port}")
    for url in urls:
        store = plugins.features(url)
        with pytest.raises(BackendUnavailable) as refused:
            await store.read([ROW], 0.01)
        assert "someone" not in str(refused.value)
        assert str(port) not in str(refused.value)
        for call in (store.ping, lambda store=store: store.write([record("1", {"a": 1})])):
            with pytest.raises(BackendUnavailable, match="no connection"):
                await asyncio.to_thread(call)
        await store.close()


async def test_each_store_in_memory_is_its_own() -> None:
    """Two stores in memory do not see each other's rows."""
    one, other = MemoryFeatures(), MemoryFeatures()
    one.write([record("1", {"a": 1})])
    assert (await read(one, ROW))[0].values == (1, NoValue.MISSING)
    assert (await read(other, ROW))[0].written_at is None
