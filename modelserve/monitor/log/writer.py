"""The inference log: a share of all answers, written to a database by one thread in the background.

It observes the server. On the way of a request it decides by the request's id, and puts what it keeps into a bounded
buffer; hashing, JSON and SQL are the thread's. A database that is away costs memory up to the bound, then records, and
never an answer.

The interpreter is shared, so the thread works little at a time and rests in between: a thousand records made in one go
would hold up all requests of those milliseconds, every time, and that is what a p99 shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple, TypeAlias

from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable, ConfigError, ModelServeError, describe
from modelserve.events import Event, Served, VersionUnloaded
from modelserve.ids import uuid7_source
from modelserve.monitor.log.buffer import Buffer, Entry
from modelserve.monitor.log.records import RecordMaker, rows_of
from modelserve.monitor.log.sampling import sample_point, threshold
from modelserve.ports import LogStore
from modelserve.types import LogRecord, LogStatus

_log = logging.getLogger("modelserve")
FLUSH_S: Final = 1.0
"""How long a record may wait for company before it is written."""
MAX_ROWS: Final = 10_000
MAX_BYTES: Final = 64 * 1024 * 1024
STOP_LIMIT_S: Final = 5.0
"""How long closing a server may wait for what is left to be written."""
_BATCH_ROWS: Final = 500
_STRETCH_S: Final = 100e-6
"""How long the thread makes records before it rests: about ten of them."""
_REST: Final = 9.0
"""How many times as long it rests then. So it takes a tenth of the interpreter, for some thousand records a second."""
_LONGEST_REST_S: Final = 0.005
_BATCH_BYTES: Final = 4 * 1024 * 1024
_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 5.0
_STOPPING_PAUSE_S: Final = 0.1
_SHORTEST_KEY: Final = 16

Clock: TypeAlias = Callable[[], float]


class _Kept(NamedTuple):
    """An answer to record. Of an error there are only the words: the error itself would keep its request in memory."""

    served: Served
    error: str | None
    maker: RecordMaker
    at: float


class InferenceLog:
    """Keeps what the options of each model sample; a model that has none of its own is sampled by default.

    ``key`` makes the hashes keyed. ``optional`` says that nobody asked for this very place: an account that may not
    write there turns the log off, which is told once, instead of being tried again. ``turned_off`` is called then, in
    the thread. ``flush_s`` is how long a record waits for company before the thread turns to it; what waits then, or is
    being written, is lost when the process is killed. ``max_rows`` and ``max_bytes`` bound it.
    """

    def __init__(
        self,
        store: LogStore,
        models: Mapping[str, ModelOptions] | None,
        *,
        key: bytes | None = None,
        optional: bool = False,
        turned_off: Callable[[], None] = lambda: None,
        flush_s: float = FLUSH_S,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        now: Clock = time.time,
    ) -> None:
        self._store = store
        self._models = models or {}
        self._thresholds = {name: threshold(options.log_sample_rate) for name, options in self._models.items()}
        self._default = threshold(ModelOptions().log_sample_rate)
        self._key = key
        self._optional = optional
        self._turned_off = turned_off
        self._flush_s = flush_s
        self._now = now
        self._new_id = uuid7_source()
        self._makers: dict[tuple[str, str], RecordMaker] = {}
        self._buffer: Buffer[_Kept] = Buffer(max_rows=max_rows, max_bytes=max_bytes)
        self._wake_rows = min(2 * _BATCH_ROWS, max_rows // 2)
        self._hurry_rows = max_rows // 2
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._given_up = threading.Event()
        self._ended = threading.Event()
        self._tell_end: Callable[[], object] = lambda: None
        self.off = False
        """Whether it was turned off, for lack of the right to write where nobody asked it to."""
        self._may_write = False
        self._sampled = self._overflowed = self._written = self._refused = self._abandoned = 0
        self._told_refused = False
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="modelserve-log", daemon=True)

    def start(self) -> None:
        """Start the thread. It asks nothing of the database before there is something to write."""
        self._thread.start()

    def status(self) -> LogStatus:
        """Return what became of the rows that were sampled."""
        return LogStatus(
            sampled=self._sampled,
            written=self._written,
            dropped=self._overflowed + self._abandoned,
            refused=self._refused,
            waiting=self._buffer.rows,
            problem=self._problem,
        )

    async def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """Write what is left and end. What cannot be written within the limit is dropped, counted and told."""
        ended = asyncio.Event()
        self._tell_end = partial(asyncio.get_running_loop().call_soon_threadsafe, ended.set)
        if self._ended.is_set():
            return
        self._stopping.set()
        self._wake.set()
        if not await _comes(ended, limit_s):
            self._given_up.set()
            if not await _comes(ended, 2 * _STOPPING_PAUSE_S):
                # In the middle of a call that does not return: what waits behind it is not the thread's any more.
                self._abandon(self._buffer.take(MAX_ROWS, MAX_BYTES))
        if self._abandoned and not self.off:
            _log.error("inference log: %d rows could not be written before the end", self._abandoned)

    # -- on the way of a request ---------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        """Keep an answer, if its request is in the sample. Called from one thread; does not wait."""
        if type(event) is not Served:
            if type(event) is VersionUnloaded:
                self._makers.pop((event.model_name, event.version), None)
            return
        if sample_point(event.request_id) >= self._thresholds.get(event.model_name, self._default):
            return
        rows = rows_of(event)
        self._sampled += rows
        maker = self._maker(event)
        event = maker.kept(event)
        error = None
        if event.error is not None:
            error, event = maker.told(event.error), event._replace(error=None)
        if not self._buffer.put(_Kept(event, error, maker, self._now()), rows, maker.size_of(event, error)):
            self._overflow(rows)
        elif self._buffer.rows >= self._wake_rows and not self._wake.is_set():
            self._wake.set()

    def _maker(self, event: Served) -> RecordMaker:
        maker = self._makers.get((event.model_name, event.version))
        if maker is None or not maker.fits(event):
            options = self._models.get(event.model_name) or ModelOptions()
            maker = RecordMaker(event, keeps_inputs=options.log_inputs, key=self._key, new_id=self._new_id)
            self._makers[event.model_name, event.version] = maker
        return maker

    def _overflow(self, rows: int) -> None:
        if not self._overflowed:
            told = (
                "inference log: %d rows had no room in the buffer (%s); records are dropped and counted until there is"
            )
            _log.error(told, rows, self._problem or "more is sampled than can be written")
        self._overflowed += rows

    # -- in the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            ended = False
            while not ended:
                self._wake.wait(self._flush_s)
                ended = self._stopping.is_set()  # looked at first: what came before is still written
                self._wake.clear()
                self._write_all()
        finally:
            self._store.close()
            self._ended.set()
            with contextlib.suppress(RuntimeError):  # the loop did not wait any longer
                self._tell_end()

    def _write_all(self) -> None:
        """Write what waits now. What comes meanwhile waits for company, or every batch would be one of few rows."""
        left = self._buffer.rows
        while left > 0 and (entries := self._buffer.take(_BATCH_ROWS, _BATCH_BYTES)):
            left -= sum(entry.rows for entry in entries)
            if self.off:
                self._abandon(entries)
                continue
            records = self._records(entries)
            if self._deliver(records):
                self._buffer.release(entries)
            else:
                self._abandon(entries)

    def _deliver(self, records: list[LogRecord]) -> bool:
        """Write records, again and again while the database is away; False when that is given up."""
        pause = _FIRST_PAUSE_S
        while not self._given_up.is_set():
            try:
                if not self._is_open():
                    return False
                refused = self._append(records)
            except ModelServeError as error:
                self._tell(str(error))
            else:
                self._refused += refused
                self._written += len(records) - refused
                self._tell(None)
                return True
            if self._stopping.wait(pause):
                self._given_up.wait(_STOPPING_PAUSE_S)
            pause = min(2 * pause, _LAST_PAUSE_S)
        return False

    def _is_open(self) -> bool:
        """Whether this account may write. Where nobody asked for the log, one that may not turns it off."""
        if not self._may_write:
            self._may_write = self._store.may_write()
        if self._may_write:
            return True
        if not self._optional:
            raise BackendUnavailable("inference log", f"this account may not add to it, at {self._store.shown_url}")
        self.off = True
        told = (
            "inference log: off, since this account may not add to the table inference_log in %s; "
            'grant INSERT on it, name another database (log="sqlite:///log.db"), or turn it off (log=False)'
        )
        _log.warning(told, self._store.shown_url)
        self._turned_off()
        return False

    def _append(self, records: list[LogRecord]) -> int:
        """Write records; return how many of them the database cannot hold. The others do not suffer for it."""
        try:
            self._store.append(records)
        except (BackendUnavailable, ConfigError):
            raise
        except Exception as error:  # noqa: BLE001  # whatever is wrong with one of them: it is found by halves
            if len(records) == 1:
                self._tell_refused(error)
                return 1
            half = len(records) // 2
            return self._append(records[:half]) + self._append(records[half:])
        return 0

    def _records(self, entries: list[Entry[_Kept]]) -> list[LogRecord]:
        """Make the records, a stretch at a time, unless there is a hurry."""
        records: list[LogRecord] = []
        began = time.thread_time()
        for entry in entries:
            records += self._records_of(entry.item)
            worked_s = time.thread_time() - began
            if worked_s > _STRETCH_S and not self._hurries():
                time.sleep(min(_REST * worked_s, _LONGEST_REST_S))
                began = time.thread_time()
        return records

    def _hurries(self) -> bool:
        return self._buffer.rows > self._hurry_rows or self._stopping.is_set()

    def _records_of(self, kept: _Kept) -> list[LogRecord]:
        try:
            return kept.maker(kept.served, kept.error, dt.datetime.fromtimestamp(kept.at, dt.UTC))
        except Exception as error:  # noqa: BLE001  # a value that nobody foresaw must not end the thread
            self._tell_refused(error)
            self._refused += rows_of(kept.served)
            return []

    def _tell_refused(self, error: Exception) -> None:
        if not self._told_refused:
            _log.error("inference log: a record was refused, further ones are only counted: %s", describe(error))
        self._told_refused = True

    def _abandon(self, entries: list[Entry[_Kept]]) -> None:
        self._abandoned += sum(entry.rows for entry in entries)
        self._buffer.release(entries)

    def _tell(self, problem: str | None) -> None:
        """Remember why nothing can be written, and tell when that begins and when it ends."""
        if problem is not None and self._problem is None:
            _log.error("inference log: %s; records wait, up to the bound", problem)
        elif problem is None and self._problem is not None:
            _log.warning("inference log: records are written again")
        self._problem = problem


async def _comes(event: asyncio.Event, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), within_s)
    return event.is_set()


def log_key_of(text: str | None) -> bytes | None:
    """Return the key of the hashes. Raises ``ConfigError`` for one that is short enough to be found by trying."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"log_key: expected a text, got {type(text).__name__}")
    key = text.encode()
    if len(key) < _SHORTEST_KEY:
        raise ConfigError(f"log_key: give at least {_SHORTEST_KEY} bytes, made at random")
    return key
