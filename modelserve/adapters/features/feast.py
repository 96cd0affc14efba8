"""Features in Feast: described in its registry, published by its jobs, read through its SDK in a few threads."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias, TypeVar

from modelserve import plugins
from modelserve.adapters.feast_views import Reading, nothing, reading_of, rows_of, some_group
from modelserve.errors import BackendUnavailable, ConfigError, MissingDependency
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow

T = TypeVar("T")
_Group: TypeAlias = tuple[str, tuple[str, ...]]
_BACKEND: Final = "Feast"
_THREADS: Final = 8
_LIMIT_S: Final = 1.0
_NOBODY: Final = "0"  # a key that both types of key take


class FeastFeatures:
    """Reads what the Feast repository in a folder describes: ``feast:///srv/features``, where feature_store.yaml lies.

    A group is a feature view with one join key, or a feature service whose views share one; names are its features.
    Publishing is Feast's own business, so :meth:`write` refuses. Raises ``ConfigError`` for a URL that cannot be read
    and ``MissingDependency`` without Feast. Importing it takes seconds, so that happens at first use, in a thread.
    """

    def __init__(self, url: str) -> None:
        self._folder = _folder(url)
        if importlib.util.find_spec("feast") is None:
            raise MissingDependency("feast", "feast")
        self._gate = threading.Lock()
        self._feast: Any = None
        self._store: Any = None
        self._readings: dict[_Group, Reading] = {}
        self._threads: ThreadPoolExecutor | None = None

    async def open(self, wanted: Sequence[_Group]) -> None:
        """Import Feast, read its registry, and look up the features of each group.

        Raises ``ConfigError`` that names what is not there or cannot be read, and ``BackendUnavailable``.
        """
        await self._in_thread(self._open, wanted)

    async def read(self, wanted: Sequence[FeatureKey], within_s: float) -> Sequence[FeatureRow | BackendUnavailable]:
        """Read many rows, one call of the SDK for all that want the same features of a group.

        A call cannot be stopped: after a second (or ``within_s``, if that is longer) it is left behind in its thread.
        """
        keys: dict[_Group, dict[str, None]] = {}
        for each in wanted:
            keys.setdefault((each.group, each.names), {})[each.key] = None
        give_up = time.monotonic() + within_s
        calls = {group: self._in_thread(self._answer, group, list(found), give_up) for group, found in keys.items()}
        if calls:
            await asyncio.wait(calls.values(), timeout=max(within_s, _LIMIT_S))
        answers = {group: _outcome(call) for group, call in calls.items()}
        failures = [each for each in answers.values() if isinstance(each, BackendUnavailable)]
        if failures and len(failures) == len(answers):
            raise failures[0]
        return [_pick(answers[each.group, each.names], each.key) for each in wanted]

    def write(self, records: Sequence[FeatureRecord]) -> None:  # noqa: ARG002  # nothing is written
        """Refuse: Feast's stores keep no row whole, and some keep the newer one of two. Raises ``ConfigError``."""
        raise ConfigError(
            "features: Feast is read only; publish with Feast itself: feast materialize, or write_to_online_store of "
            "its FeatureStore"
        )

    def ping(self) -> None:
        """Read a row that nobody has, of any feature view. Raises ``BackendUnavailable``."""
        with _as_unavailable():
            with self._gate:
                store, reading = self._opened(), self._some_reading()
            if reading is not None:
                with _our_errors():
                    _ask(store, reading, [_NOBODY])

    async def close(self) -> None:
        """End the threads and close what the SDK closes. Safe to call twice; later use opens it again."""
        threads, self._threads = self._threads, None
        store, self._store = self._store, None
        self._readings = {}
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        if store is not None:
            with contextlib.suppress(Exception):  # whatever its online store does not do any more
                await store.close()

    # -- in a thread ---------------------------------------------------------------------------------------

    def _in_thread(self, call: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="modelserve-features")
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _open(self, wanted: Sequence[_Group]) -> None:
        with self._gate:
            self._opened()
            for group in wanted:
                self._reading(group)

    def _answer(self, group: _Group, keys: Sequence[str], give_up: float) -> dict[str, FeatureRow] | BackendUnavailable:
        """Return rows by key, or what went wrong: an error that nobody waits for any more is not raised."""
        try:
            with _as_unavailable():
                with self._gate:
                    store, reading = self._opened(), self._reading(group)
                if time.monotonic() >= give_up:
                    return BackendUnavailable(_BACKEND, "no thread was free in time")
                return self._rows(store, reading, group, keys)
        except BackendUnavailable as error:
            return error

    def _rows(self, store: Any, reading: Reading, group: _Group, keys: Sequence[str]) -> dict[str, FeatureRow]:
        names = group[1]
        rows = dict.fromkeys(keys, nothing(names))
        known = [key for key in keys if reading.key_of(key) is not None]
        if not known:
            return rows
        try:
            with _our_errors():
                return rows | dict(zip(known, rows_of(_ask(store, reading, known), names), strict=True))
        except BackendUnavailable:
            self._readings.pop(group, None)  # the registry may have changed: look it up again
            raise

    def _opened(self) -> Any:
        """Return the SDK's store, made once; whoever calls holds the gate."""
        if self._store is None:
            with _our_errors():
                self._feast = plugins.require("feast")
            store = _made(self._feast, self._folder)
            with _our_errors():
                store.registry.refresh(store.project)
            self._store = store
        return self._store

    def _reading(self, group: _Group) -> Reading:
        """Return how a group is read. What the registry says is asked for once, and the first call made alone.

        The SDK opens connections at its first call, and takes no care of others that do so at the same moment.
        """
        if group not in self._readings:
            with _our_errors():
                reading = reading_of(self._feast, self._store, *group)
                _ask(self._store, reading, [_NOBODY])
            self._readings[group] = reading
        return self._readings[group]

    def _some_reading(self) -> Reading | None:
        if not self._readings:
            with _our_errors():
                group = some_group(self._feast, self._store)
            if group is not None:
                return self._reading(group)
        return next(iter(self._readings.values()), None)


def _folder(url: str) -> str:
    problem = "features: the URL of the store cannot be read; it is written feast:///path/to/the/feature/repository"
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        raise ConfigError(problem) from None
    if parts.netloc or not parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(problem)
    return urllib.parse.unquote(parts.path)


def _made(feast: Any, folder: str) -> Any:
    """Make the SDK's store, which connects to nothing yet. Raises ``ConfigError`` without what the file holds."""
    try:
        store = feast.FeatureStore(repo_path=folder)
        _keep(store.config.registry)
        store.provider  # noqa: B018  # imports the drivers of its stores
    except FileNotFoundError as error:
        raise ConfigError(f"features: there is no feature_store.yaml in {folder}") from error
    except (ImportError, feast.errors.FeastExtrasDependencyImportError, feast.errors.FeastModuleImportError) as error:
        problem = "needs a package that is not installed; Feast's extras bring them: pip install 'feast[redis]'"
        raise ConfigError(f"features: the feature_store.yaml in {folder} {problem}") from error
    except Exception as error:
        raise ConfigError(f"features: the feature_store.yaml in {folder} is none that Feast takes") from error
    return store


def _keep(registry: Any) -> None:
    """Let the registry that was read serve until the end, unless the file says how long.

    The SDK would read it again every ten minutes, within somebody's request, and fail every request if it is away.
    """
    if "cache_ttl_seconds" not in registry.model_fields_set:
        registry.cache_ttl_seconds = 0


def _ask(store: Any, reading: Reading, keys: Sequence[str]) -> Any:
    values = [reading.key_of(key) for key in keys]
    return store.get_online_features(features=list(reading.references), entity_rows={reading.join_key: values}).proto


def _outcome(call: asyncio.Future[dict[str, FeatureRow] | BackendUnavailable]) -> Any:
    if call.cancelled():
        return BackendUnavailable(_BACKEND, "it was closed")
    if call.done():
        return call.result()
    call.cancel()  # where no thread has taken it yet
    return BackendUnavailable(_BACKEND, "it does not answer in time")


def _pick(answer: dict[str, FeatureRow] | BackendUnavailable, key: str) -> FeatureRow | BackendUnavailable:
    return answer if isinstance(answer, BackendUnavailable) else answer[key]


@contextlib.contextmanager
def _as_unavailable() -> Iterator[None]:
    """Say what is wrong with the configuration to who only reads."""
    try:
        yield
    except (ConfigError, MissingDependency) as error:
        raise BackendUnavailable(_BACKEND, str(error).removeprefix("features: ")) from error


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    """Stop what the SDK and the drivers below it raise, which can be anything, with any secret in it."""
    try:
        yield
    except (ConfigError, MissingDependency, BackendUnavailable):
        raise
    except Exception as error:
        raise BackendUnavailable(_BACKEND, _in_a_word(error)) from error


def _in_a_word(error: Exception) -> str:
    name = type(error).__name__
    if "Timeout" in name:
        return "its store does not answer in time"
    if "Connect" in name:
        return "no connection to its store"
    if "NotFound" in name:
        return f"its registry lacks something that is read ({name})"
    return f"its SDK failed ({name})"
