"""Features in DynamoDB: an item per row, read by BatchGetItem in a few threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.features.layout import TIME, decoded, row_id, time_of
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow, NoValue

_BACKEND: Final = "DynamoDB"
_ID: Final = "_id"
_GETS: Final = 100  # keys of one BatchGetItem
_PUTS: Final = 25  # items of one BatchWriteItem
_LIMIT_S: Final = 1.0
_THREADS: Final = 8
_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.5
_WRITE_LIMIT_S: Final = 30.0
_SERVER_ERROR: Final = 500
_OPTIONS: Final = ("endpoint", "region")


class DynamoDbFeatures:
    """Keeps the row ``user_id:42`` in the item with that ``_id`` of the table of ``dynamodb://table?region=eu-west-1``.

    The table's partition key is ``_id``, a string; every feature is an attribute that holds JSON text. Credentials, and
    the region where the URL has none, are found as boto3 finds them; ``endpoint`` is for other servers than Amazon's.
    Raises ``ConfigError`` for a URL that cannot be read and ``MissingDependency`` without boto3. Nothing is opened
    before first use.
    """

    def __init__(self, url: str) -> None:
        self._botocore = plugins.require("botocore.exceptions")
        self._table, place = _parsed(url)
        self._client = self._client_of(place)
        self._threads: ThreadPoolExecutor | None = None

    async def read(self, wanted: Sequence[FeatureKey], within_s: float) -> Sequence[FeatureRow | BackendUnavailable]:
        """Read many rows, a hundred a request. What DynamoDB leaves out for lack of capacity is asked for again."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="modelserve-features")
        loop = asyncio.get_running_loop()
        ids = list(dict.fromkeys(row_id(key.group, key.key) for key in wanted))
        give_up = time.monotonic() + within_s
        parts = [
            loop.run_in_executor(self._threads, self._get, ids[start : start + _GETS], give_up)
            for start in range(0, len(ids), _GETS)
        ]
        found: dict[str, Mapping[str, Any] | None] = {}
        for part in await asyncio.gather(*parts):
            found |= part
        return [self._row(key, found) for key in wanted]

    def write(self, records: Sequence[FeatureRecord]) -> None:
        """Write rows, each in place of the one before it; the last of several with one key counts."""
        latest = {row_id(record.group, record.key): record for record in records}
        items = iter(latest.items())
        while part := list(itertools.islice(items, _PUTS)):
            self._put([{"PutRequest": {"Item": _item(name, record)}} for name, record in part])

    def ping(self) -> None:
        """Ask for an item that is not there. Raises ``BackendUnavailable``."""
        with self._our_errors():
            self._client.get_item(TableName=self._table, Key={_ID: {"S": "ping"}})

    async def close(self) -> None:
        """Close the connections and end the threads. Safe to call twice; later use opens new ones."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _get(self, ids: Sequence[str], give_up: float) -> dict[str, Mapping[str, Any] | None]:
        """Return the items by id; None for one that was not read in time. What has no item is not in it."""
        left: Any = {self._table: {"Keys": [{_ID: {"S": each}} for each in ids]}}
        found: dict[str, Mapping[str, Any] | None] = {}
        for pause in _pauses():
            with self._our_errors():
                answer = self._client.batch_get_item(RequestItems=left)
            found |= {item[_ID]["S"]: item for item in answer.get("Responses", {}).get(self._table, ())}
            left = answer.get("UnprocessedKeys")
            if not left or time.monotonic() + pause >= give_up:
                break
            time.sleep(pause)
        unread = left.get(self._table, {}).get("Keys", ()) if left else ()
        return found | dict.fromkeys((key[_ID]["S"] for key in unread), None)

    def _put(self, requests: list[Any]) -> None:
        """Write items until all are taken. To put one twice does no harm, so what came to nothing is tried again."""
        left: Any = {self._table: requests}
        give_up = time.monotonic() + _WRITE_LIMIT_S
        for pause in _pauses():
            try:
                with self._our_errors():
                    left = self._client.batch_write_item(RequestItems=left).get("UnprocessedItems")
            except BackendUnavailable as error:
                if time.monotonic() + pause >= give_up or not self._may_pass(error.__cause__):
                    raise
            if not left:
                return
            if time.monotonic() + pause >= give_up:
                raise BackendUnavailable(_BACKEND, f"it did not take every row within {_WRITE_LIMIT_S:.0f} s")
            time.sleep(pause)

    def _row(
        self, wanted: FeatureKey, found: Mapping[str, Mapping[str, Any] | None]
    ) -> FeatureRow | BackendUnavailable:
        item = found.get(row_id(wanted.group, wanted.key), {})
        if item is None:
            return BackendUnavailable(_BACKEND, "it has no capacity for this row now")
        values = tuple(_decoded(item.get(name)) for name in wanted.names)
        return FeatureRow(values, time_of(item.get(TIME, {}).get("N")))

    def _client_of(self, place: Mapping[str, str]) -> Any:
        config = plugins.require("botocore.config").Config(
            connect_timeout=_LIMIT_S,
            read_timeout=_LIMIT_S,
            max_pool_connections=_THREADS,
            retries={"total_max_attempts": 1},  # what is worth trying again is tried within the budget, here
            tcp_keepalive=True,
        )
        try:
            session = plugins.require("boto3").session.Session()
            return session.client("dynamodb", config=config, **place)
        except (self._botocore.BotoCoreError, ValueError) as error:
            raise ConfigError(f"features: no client for DynamoDB can be made: {_in_a_word(error)}") from error

    @contextlib.contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except self._botocore.ClientError as error:
            raise BackendUnavailable(_BACKEND, self._refusal(error)) from error
        except (self._botocore.BotoCoreError, OSError) as error:
            raise BackendUnavailable(_BACKEND, _in_a_word(error)) from error

    def _may_pass(self, error: Any) -> bool:
        """Whether the same request, sent again, may succeed: DynamoDB was reached, and was too busy or broke off."""
        if isinstance(error, self._botocore.ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status >= _SERVER_ERROR or _lacks_capacity(_code(error))
        return isinstance(error, self._botocore.ReadTimeoutError | self._botocore.ConnectionClosedError)

    def _refusal(self, error: Any) -> str:
        code = _code(error)
        if code == "ResourceNotFoundException":
            return f"there is no table {self._table!r}"
        if _lacks_capacity(code):
            return "it has no capacity now"
        if "Access" in code or "Token" in code or "Signature" in code:
            return "it refuses the credentials, or what they may do"
        return "it refuses the request"


def _parsed(url: str) -> tuple[str, dict[str, str]]:
    problem = "it is written dynamodb://table?region=eu-west-1"
    try:
        parts = urllib.parse.urlsplit(url)
        options = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ConfigError(f"features: the URL of the store cannot be read; {problem}") from None
    unknown = next((name for name in options if name not in _OPTIONS), None)
    if not parts.netloc or parts.path.strip("/") or unknown is not None:
        raise ConfigError(f"features: the URL of the store cannot be read; {problem}, options: {', '.join(_OPTIONS)}")
    names = {"endpoint": "endpoint_url", "region": "region_name"}
    return parts.netloc, {names[name]: value for name, value in options.items()}


def _item(name: str, record: FeatureRecord) -> dict[str, Any]:
    values = {feature: {"S": text.decode()} for feature, text in record.values.items()}
    return {**values, _ID: {"S": name}, TIME: {"N": repr(record.written_at)}}


def _decoded(attribute: Mapping[str, Any] | None) -> Any:
    if attribute is None:
        return NoValue.MISSING
    return decoded(attribute["S"]) if "S" in attribute else NoValue.UNREADABLE


def _pauses() -> Iterable[float]:
    """Return pauses that double, each somewhat at random: who was refused together should not come back together."""
    for i in itertools.count():
        yield min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0**i) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _lacks_capacity(code: str) -> bool:
    return "Throughput" in code or "Throttl" in code or code == "RequestLimitExceeded"


def _in_a_word(error: BaseException) -> str:
    name = type(error).__name__
    if "Timeout" in name:
        return "it does not answer in time"
    if "Credentials" in name:
        return "there are no credentials"
    if name == "NoRegionError":
        return "there is no region; put region= into the URL"
    return "the endpoint is no URL" if isinstance(error, ValueError) else "no connection"
