"""What a cached prediction costs: in process beside a dict, from Redis beside a bare MGET, and the digest of an input.

``python -m benchmarks.caching [--quick]``. Everything runs in one process beside a Redis server that it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis.asyncio
import uvloop

import modelserve as ms
from benchmarks._common import (
    MODEL,
    Budget,
    alternate,
    arguments,
    median,
    open_registry,
    print_table,
    ratio,
    real_rows,
    register_small_model,
    report,
)
from modelserve.caching import PredictionCache
from modelserve.signature import Field, Signature
from tests import servers

CALLERS: Final = 256
_PREFIX: Final = "bench:"


def main() -> None:
    """Measure, print and write the figures."""
    quick = arguments(__doc__).parse_args().quick
    rounds, seconds, calls = (2, 0.5, 2000) if quick else (5, 2.0, 20_000)
    with tempfile.TemporaryDirectory() as name, servers.redis() as server:
        folder = Path(name)
        register_small_model(folder).close()
        digests = _digests(calls, rounds)
        hits = _hits(folder, calls, rounds)
        shared = _shared(folder, f"{server.url}?prefix={_PREFIX}", seconds, rounds)
    print_table("digest of an input of 30 numbers, microseconds", digests)
    print_table("a hit in process, microseconds, one after the other", hits)
    print_table(f"hits in Redis a second, {CALLERS} callers", shared)
    report("caching", quick=quick, rows=[*digests, *hits, *shared], budgets=_budgets(digests, hits, shared))


# -- digests -----------------------------------------------------------------------------------------------


def _digests(calls: int, rounds: int) -> list[dict[str, Any]]:
    names = [f"feature_{i}" for i in range(30)]
    kinds = {
        "30 float64": [Field(name, "float64") for name in names],
        "30 of four types": [Field(n, ("float64", "int64", "float32", "bool")[i % 4]) for i, n in enumerate(names)],
        "float64[30]": [Field("x", "float64", (30,))],
    }
    return [
        {"inputs": kind, "digest": median(_timed(fields, calls) for _ in range(rounds))}
        for kind, fields in kinds.items()
    ]


def _timed(fields: Sequence[Field], calls: int) -> float:
    signature = Signature(fields)
    values = {"float64": 1.5, "float32": 0.5, "int64": 3, "bool": True}
    row = signature.validate({f.name: [values[f.dtype]] * 30 if f.shape else values[f.dtype] for f in fields})
    started = time.perf_counter()
    for _ in range(calls):
        hashlib.sha256(signature.canonical(row)).digest()
    return (time.perf_counter() - started) / calls * 1e6


# -- in process --------------------------------------------------------------------------------------------


def _hits(folder: Path, calls: int, rounds: int) -> list[dict[str, Any]]:
    with _serving(folder, None) as (server, runner):
        inputs = [{"x": row} for row in real_rows().tolist()]
        runner.run(_warm(server, inputs))
        sides: dict[str, Callable[[], float]] = {
            "dict": partial(_dict_microseconds, calls),
            "hit": lambda: runner.run(_hit_microseconds(server, inputs, calls)),
        }
        found = alternate(sides, rounds)
    return [{"inputs": "float64[30]", "dict": median(found["dict"]), "hit": median(found["hit"])}]


async def _warm(server: ms.AsyncModelServer, inputs: Sequence[Any]) -> None:
    await asyncio.gather(*(server.predict(MODEL, each) for each in inputs))


def _dict_microseconds(calls: int) -> float:
    known = {bytes([i]) * 32: i for i in range(256)}
    keys = list(known)
    started = time.perf_counter()
    for i in range(calls):
        known[keys[i % 256]]
    return (time.perf_counter() - started) / calls * 1e6


async def _hit_microseconds(server: ms.AsyncModelServer, inputs: Sequence[Any], calls: int) -> float:
    started = time.perf_counter()
    for i in range(calls):
        answer = await server.predict(MODEL, inputs[i % len(inputs)])
        assert answer.cached
    return (time.perf_counter() - started) / calls * 1e6


# -- Redis -------------------------------------------------------------------------------------------------


def _shared(folder: Path, url: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    # The budget would turn a busy machine's reads into misses: here every answer is to come from Redis.
    with _serving(folder, f"{url}&budget_ms=1000") as (server, runner):
        inputs = [{"x": row} for row in real_rows().tolist()]
        runner.run(_warm(server, inputs))
        client = redis.asyncio.Redis.from_url(url.partition("?")[0], protocol=2)
        keys = runner.run(_kept(client, len(inputs)))
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            "mget": lambda: _with_cpu(runner, _bare_rate(client, keys, seconds), seconds),
            "served": lambda: _with_cpu(runner, _served_rate(server, inputs, seconds), seconds),
        }
        found = alternate(sides, rounds)
        runner.run(client.aclose())
    rates = {side: [rate for rate, _ in figures] for side, figures in found.items()}
    cpu_us = {f"{side}_cpu_us": median(spent for _, spent in figures) for side, figures in found.items()}
    share = {"served / mget": ratio(rates["served"], rates["mget"])}
    return [{"callers": CALLERS} | {side: median(figures) for side, figures in rates.items()} | share | cpu_us]


def _with_cpu(runner: asyncio.Runner, work: Coroutine[Any, Any, float], seconds: float) -> tuple[float, float]:
    """Return a rate, and the processor time of this process for each answer, in microseconds."""
    began = time.process_time()
    rate = runner.run(work)
    return rate, (time.process_time() - began) / (rate * seconds) * 1e6


async def _kept(client: Any, count: int) -> list[bytes]:
    """Wait until Redis holds every answer; return the keys."""
    while len(keys := await client.keys(f"{_PREFIX}*")) < count:  # noqa: ASYNC110  # Redis tells nobody
        await asyncio.sleep(0.01)
    return keys  # type: ignore[no-any-return]


async def _bare_rate(client: Any, keys: Sequence[bytes], seconds: float) -> float:
    """Read as many keys at a time as there are callers, one MGET after the other."""
    ring, done = itertools.cycle(keys), 0
    started = now = time.perf_counter()
    while now < started + seconds:
        await client.mget(list(itertools.islice(ring, CALLERS)))
        done += CALLERS
        now = time.perf_counter()
    return done / (now - started)


async def _served_rate(server: ms.AsyncModelServer, inputs: Sequence[Any], seconds: float) -> float:
    """Let the callers predict one row after the other, with nothing kept in this process."""
    predictions = server._require_running().predictions  # noqa: SLF001  # its memory would answer in place of Redis
    assert isinstance(predictions, PredictionCache)
    predictions._tiers._local.put = lambda *_: None  # type: ignore[method-assign]  # noqa: SLF001
    await predictions._tiers._local.clear("")  # noqa: SLF001
    ring, started = itertools.cycle(inputs), time.perf_counter()

    async def caller() -> int:
        done = 0
        while time.perf_counter() < started + seconds:
            done += (await server.predict(MODEL, next(ring))).cached
        return done

    done = await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return sum(done) / (time.perf_counter() - started)


@contextlib.contextmanager
def _serving(folder: Path, cache: str | None) -> Iterator[tuple[ms.AsyncModelServer, asyncio.Runner]]:
    models = {MODEL: ms.ModelOptions(cache_ttl_s=3600, timeout_ms=10_000, slo_ms=5000)}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = ms.AsyncModelServer(  # unobserved: what the log and the metrics take is measured in inference_log
            open_registry(folder), models, cache_dir=folder / "cache", cache=cache, log=False, metrics=False
        )
        runner.run(server.start())
        try:
            yield server, runner
        finally:
            runner.run(server.close())


def _budgets(
    digests: Sequence[dict[str, Any]], hits: Sequence[dict[str, Any]], shared: Sequence[dict[str, Any]]
) -> list[Budget]:
    return [
        *(
            Budget(f"microseconds for the digest of {row['inputs']}", 10, row["digest"], at_least=False)
            for row in digests
        ),
        Budget("microseconds for a hit in process", 30, hits[0]["hit"], at_least=False),
        Budget("hits in Redis a second from one process", 20_000, shared[0]["served"]),
    ]


if __name__ == "__main__":
    main()
