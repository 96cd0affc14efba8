"""The inference log and the metrics: rows a second beside a bare bulk insert, and what they cost a request."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
import itertools
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import uvloop

import modelserve as ms
from benchmarks._common import (
    MODEL,
    Budget,
    alternate,
    arguments,
    machine,
    median,
    open_registry,
    percentile,
    print_table,
    ratio,
    real_rows,
    register_small_model,
    report,
)
from modelserve.events import Served
from modelserve.ids import uuid7_source
from modelserve.monitor.log.records import RecordMaker
from modelserve.monitor.log.writer import InferenceLog
from modelserve.monitor.metrics.counters import Metrics
from modelserve.signature import Field, Signature
from modelserve.stores.inference_log import LogTable
from modelserve.types import LogRecord
from tests import servers
from tests.serving.versions import version_of

CALLERS: Final = 64
STEADY_PER_S: Final = (1_000, 2_000)
EVERYTHING: Final = {MODEL: ms.ModelOptions(log_sample_rate=1.0)}
_CREATE: Final = (
    "CREATE TABLE bare (id {uuid} PRIMARY KEY, request_id text, row_index int, model_name text, version text, "
    "input_hash text, inputs {json}, prediction {json}, error text, latency_ms float8, cached bool, "
    "degraded {json}, shadow bool, occurred_at {moment})"
)
_NAMES: Final = ", ".join(LogRecord._fields)


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    rounds, seconds, rows = (3, 0.5, 5_000) if quick else (5, 3.0, 30_000)
    print(machine())
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        writing = [_writing("SQLite", f"sqlite:///{folder}/log.db", partial(_bare_sqlite, folder), rows, rounds)]
        with contextlib.suppress(servers.ServerMissing):
            server = stack.enter_context(servers.postgres())
            url = server.url(server.create_database())
            writing.append(_writing("PostgreSQL", url, partial(_bare_postgres, url), rows, rounds))
        register_small_model(folder).close()
        steady = {rate: _watched(folder, partial(_steady, rate), seconds, rounds) for rate in STEADY_PER_S}
        saturated = _watched(folder, _saturating, seconds, rounds)
    costs = _costs(20_000 if quick else 200_000)
    print_table(f"rows per second (medians of {rounds})", writing)
    for rate, table in steady.items():
        print_table(f"{rate} requests a second (medians of {rounds} × {seconds} s)", table)
    print_table(f"as many as {CALLERS} callers can send (medians of {rounds} × {seconds} s)", saturated)
    print_table("nanoseconds of the event loop per request", costs)
    budgets = [_budget(rate, table) for rate, table in steady.items()]
    at_rates = [row for table in steady.values() for row in table]
    report("inference_log", quick=quick, rows=[*writing, *at_rates, *saturated, *costs], budgets=budgets)


def _budget(rate: int, table: list[dict[str, Any]]) -> Budget:
    found = next(row["p99 / nothing"] for row in table if row["watched by"] == "log")
    return Budget(f"p99 at {rate}/s with the log at its default rate / without", 1.05, found, at_least=False)


# -- rows a second -----------------------------------------------------------------------------------------


def _writing(
    name: str, url: str, bare: Callable[[Sequence[LogRecord]], float], rows: int, rounds: int
) -> dict[str, Any]:
    events = _events(rows)
    maker = RecordMaker(events[0], keeps_inputs=True, key=None, new_id=uuid7_source())

    def bare_rate() -> float:
        now = dt.datetime.now(dt.UTC)
        return bare([record for event in events for record in maker(event, None, now)])

    found = alternate({"bare": bare_rate, "log": lambda: _log_rate(url, events)}, rounds)
    medians = {side: median(rates) for side, rates in found.items()}
    return {"into": name} | medians | {"log / bare": ratio(found["log"], found["bare"])}


def _events(count: int) -> list[Served]:
    """Make answers to 30 numbers each."""
    signature = Signature([Field("x", "float64", (30,))])
    meta, new_id = version_of(MODEL, "1"), uuid7_source()
    rows = [signature.validate({"x": row}) for row in real_rows().tolist()]
    return [
        Served(MODEL, "1", new_id(), 1, 1.5, None, [row], [1], meta=meta, signature=signature)
        for row in itertools.islice(itertools.cycle(rows), count)
    ]


def _log_rate(url: str, events: Sequence[Served]) -> float:
    """Return the rows a second from the observer's call to the last commit: hashing and JSON included."""

    async def run() -> float:
        with open_registry(Path()) as registry:
            table = registry.inference_log(url)
            table.prune(dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
            log = InferenceLog(table, EVERYTHING, max_rows=len(events), max_bytes=1 << 30)
            log.start()
            started = time.perf_counter()
            for event in events:
                log(event)
            await log.stop(120)
            assert log.status().written == len(events)
            return len(events) / (time.perf_counter() - started)

    return asyncio.run(run())


def _bare_sqlite(folder: Path, records: Sequence[LogRecord]) -> float:
    """Insert finished rows, a thousand a transaction, with the driver alone."""
    path = folder / "bare.db"
    path.unlink(missing_ok=True)
    rows = [(*record[:-1], str(record.occurred_at)) for record in records]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(_CREATE.format(uuid="text", json="text", moment="text"))
        connection.execute("CREATE INDEX ix ON bare (model_name, occurred_at, id)")
        started = time.perf_counter()
        for at in range(0, len(rows), 1000):
            with connection:
                places = ", ".join("?" * len(LogRecord._fields))
                connection.executemany(f"INSERT INTO bare VALUES ({places})", rows[at : at + 1000])  # noqa: S608  # constants
        return len(rows) / (time.perf_counter() - started)


def _bare_postgres(url: str, records: Sequence[LogRecord]) -> float:
    """Copy finished rows, a thousand a transaction, with the driver alone: the fastest way in that there is."""
    import psycopg  # noqa: PLC0415  # only where there is a server

    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("DROP TABLE IF EXISTS bare")
        connection.execute(_CREATE.format(uuid="uuid", json="jsonb", moment="timestamptz").encode())
        connection.execute("CREATE INDEX ix ON bare (model_name, occurred_at, id)")
        connection.commit()
        started = time.perf_counter()
        for at in range(0, len(records), 1000):
            with connection.cursor().copy(f"COPY bare ({_NAMES}) FROM STDIN".encode()) as copy:
                for record in records[at : at + 1000]:
                    copy.write_row(record)
            connection.commit()
        return len(records) / (time.perf_counter() - started)


# -- requests with and without observers -------------------------------------------------------------------

_SIDES: Final[dict[str, tuple[str, ...]]] = {
    "nothing": (),
    "nothing, again": (),
    "metrics": ("metrics",),
    "log": ("log",),
    "both": ("metrics", "log"),
    "both, log of all": ("metrics", "log of all"),
}
Load: TypeAlias = Callable[[ms.AsyncModelServer, float], Coroutine[Any, Any, tuple[float, float]]]


def _watched(folder: Path, load: Load, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Put a load on one server that different observers watch in turn: answers per second, and the p99 in milliseconds.

    Two servers of one make differ by more than an observer costs.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, open_registry(folder) as registry:
        server = ms.AsyncModelServer(registry, cache_dir=folder / "cache", log=False, metrics=False)
        runner.run(server.start())
        gc.collect()
        gc.freeze()  # or a full collection, which takes 100 ms, hits one side and not the other

        def side(watchers: tuple[str, ...]) -> tuple[float, float]:
            return runner.run(_under_load(server, registry.inference_log(), watchers, load, seconds))

        side(())
        found = alternate({name: partial(side, watchers) for name, watchers in _SIDES.items()}, rounds)
        runner.run(server.close())
    off = found["nothing"]
    return [
        {
            "watched by": name,
            "per second": median(rate for rate, _ in figures),
            "/ nothing": ratio([rate for rate, _ in figures], [rate for rate, _ in off]),
            "p99 ms": median(p99 for _, p99 in figures),
            "p99 / nothing": ratio([p99 for _, p99 in figures], [p99 for _, p99 in off]),
        }
        for name, figures in found.items()
    ]


async def _under_load(
    server: ms.AsyncModelServer, table: LogTable, watchers: tuple[str, ...], load: Load, seconds: float
) -> tuple[float, float]:
    """Measure while these watch, and wait until what they logged has been written."""
    async with contextlib.AsyncExitStack() as stack:
        for name in watchers:
            if name == "metrics":
                stack.callback(server.observe(Metrics()))
                continue
            log = InferenceLog(table, EVERYTHING if name == "log of all" else None)
            log.start()
            stack.push_async_callback(log.stop, 60)
            stack.callback(server.observe(log))
        return await load(server, seconds)


async def _steady(rate: float, server: ms.AsyncModelServer, seconds: float) -> tuple[float, float]:
    """Send requests at random moments, whether or not those before were answered; latency counts from that moment."""
    inputs = itertools.cycle([{"x": row} for row in real_rows().tolist()])
    moments, latencies = random.Random(1), list[float]()  # moments, not secrets

    async def request(due: float) -> None:
        await server.predict(MODEL, next(inputs))
        latencies.append((time.perf_counter() - due) * 1000)

    async with asyncio.TaskGroup() as requests:
        due = started = time.perf_counter()
        while due < started + seconds:
            due += moments.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            requests.create_task(request(due))
    return len(latencies) / (time.perf_counter() - started), percentile(latencies, 0.99)


async def _saturating(server: ms.AsyncModelServer, seconds: float) -> tuple[float, float]:
    """Let callers predict one row after the other, as fast as they are answered."""
    inputs = itertools.cycle([{"x": row} for row in real_rows().tolist()])
    latencies: list[float] = []
    started = time.perf_counter()
    end = started + seconds

    async def caller() -> None:
        while time.perf_counter() < end:
            latencies.append((await server.predict(MODEL, next(inputs))).latency_ms)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return len(latencies) / (time.perf_counter() - started), percentile(latencies, 0.99)


# -- on the event loop -------------------------------------------------------------------------------------


def _costs(calls: int) -> list[dict[str, Any]]:
    class Nowhere:
        shown_url = ""

        def may_write(self) -> bool:
            return True

        def append(self, records: Sequence[LogRecord]) -> None:
            pass

        def close(self) -> None:
            pass

    events = _events(1000)
    everything = InferenceLog(Nowhere(), EVERYTHING, max_rows=10 * calls, max_bytes=1 << 40)
    watchers: dict[str, Callable[[Any], None]] = {
        "metrics": Metrics(),
        "log, rate 0.1": InferenceLog(Nowhere(), None, max_rows=10 * calls, max_bytes=1 << 40),
        "log, rate 1": everything,
    }
    return [{"observer": name, "ns": _nanoseconds(watcher, events, calls)} for name, watcher in watchers.items()]


def _nanoseconds(watcher: Callable[[Any], None], events: Sequence[Served], calls: int) -> float:
    started = time.perf_counter_ns()
    for event in itertools.islice(itertools.cycle(events), calls):
        watcher(event)
    return (time.perf_counter_ns() - started) / calls


if __name__ == "__main__":
    main()
