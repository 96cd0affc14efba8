"""Closed loops of 1, 64, 256, 8 and 64 callers, one after the other on one server: what is refused below capacity.

Each caller asks again as soon as it has its answer, from code and over HTTP. All options but the executor are defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import math
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvicorn
import uvloop

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, open_registry, percentile, print_table, report
from benchmarks._load import Load, Outcome, generator, post, run
from benchmarks._networks import Network, logistic, onnx_forest, sklearn_forest, torch_mlp

CALLERS: Final = (1, 64, 256, 8, 64)
OPTIONS: Final = ms.ModelOptions()
SLO_S: Final = OPTIONS.slo_ms / 1000
LARGEST: Final = 256
SUBJECTS: Final = {
    "torch-thread": (torch_mlp, "thread"),
    "torch-process": (torch_mlp, "process"),
    "logistic-thread": (logistic, "thread"),
    "logistic-process": (logistic, "process"),
    "forest-process": (sklearn_forest, "process"),
    "onnx-thread": (onnx_forest, "thread"),
}


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="only these")
    parser.add_argument("--ways", nargs="+", choices=("code", "http"), default=["code", "http"], help="only these")
    parser.add_argument("--seconds", type=float, help="how long each loop lasts")
    options = parser.parse_args()
    seconds = options.seconds or (0.5 if options.quick else 2.0)
    print(machine())
    rows: list[dict[str, Any]] = []
    with generator() as process:
        for name, way in itertools.product(options.subjects, options.ways):
            found = uvloop.run(_sequence(name, way, seconds, process))
            print_table(f"{name}, {way}; times in milliseconds, rates per second", found)
            rows += found
    report("closed_loop", quick=options.quick, rows=rows, budgets=_budgets(rows))


async def _sequence(name: str, way: str, seconds: float, process: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Run the loops one after the other on one server, and the bare model before each."""
    make, executor = SUBJECTS[name]
    network = make()
    rows = []
    async with _serving(network, executor) as server, contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(_listening(server)) if way == "http" else 0
        for callers in CALLERS:
            bare = _bare_rate(network, callers, seconds / 4)
            if way == "http":
                outcome = await _over_http(process, port, network, callers, seconds)
            else:
                outcome = await _from_code(server, network, callers, seconds)
            rows.append(_row(f"{name} {way}", callers, bare, outcome))
    return rows


@contextlib.asynccontextmanager
async def _serving(network: Network, executor: str) -> AsyncIterator[ms.AsyncModelServer]:
    with tempfile.TemporaryDirectory() as folder:
        registry = open_registry(Path(folder))
        registry.register("m", "1", network.model, example=network.rows[:4], **network.register)
        registry.promote("m", "1")
        options = ms.ModelOptions(executor=executor, **network.allowed)  # type: ignore[arg-type]  # one of its literals
        async with ms.AsyncModelServer(registry, {"m": options}, cache_dir=Path(folder) / "cache") as server:
            gc.freeze()  # as docs/how-to/deploy.md advises: a full collection stops the loop for longer than the SLO
            yield server


@contextlib.asynccontextmanager
async def _listening(server: ms.AsyncModelServer) -> AsyncIterator[int]:
    """Serve over HTTP in this loop; yield the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        config = uvicorn.Config(
            ms.asgi(server), http="httptools", lifespan="off", access_log=False, log_level="warning"
        )
        web = uvicorn.Server(config)
        web.config.load()
        serving = asyncio.create_task(web._serve([listener]))  # noqa: SLF001  # `serve` takes over the host's signals
        try:
            yield listener.getsockname()[1]  # a connection waits in the backlog until it is accepted
        finally:
            web.should_exit = True
            await serving


def _bare_rate(network: Network, rows: int, seconds: float) -> float:
    """Return rows per second of the bare model on batches of as many rows as there are callers."""
    batch = np.resize(network.rows, (min(rows, LARGEST), *network.rows.shape[1:]))
    network.bare(batch)
    done, started = 0, time.perf_counter()
    while (now := time.perf_counter()) < started + seconds:
        network.bare(batch)
        done += len(batch)
    return done / (now - started)


async def _over_http(
    process: ProcessPoolExecutor, port: int, network: Network, callers: int, seconds: float
) -> Outcome:
    requests = [post("/predict/m", json.dumps({"inputs": {"x": row}}).encode()) for row in network.rows[:64].tolist()]
    load = Load(port, requests, callers, seconds)
    return await asyncio.wrap_future(process.submit(run, load))


async def _from_code(server: ms.AsyncModelServer, network: Network, callers: int, seconds: float) -> Outcome:
    inputs = itertools.cycle([{"x": row} for row in network.rows])
    outcome = Outcome(started=time.perf_counter())
    outcome.ended = outcome.started + seconds

    async def caller() -> None:
        now = time.perf_counter()
        while now < outcome.ended:
            began = now
            try:
                await server.predict("m", next(inputs))
            except ms.ModelServeError as error:
                outcome.failures[type(error).__name__] += 1
                await asyncio.sleep(0)
                now = time.perf_counter()
            else:
                now = time.perf_counter()
                outcome.finished.append(now)
                outcome.latencies.append(now - began)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return outcome


def _row(name: str, callers: int, bare: float, outcome: Outcome) -> dict[str, Any]:
    answered, failed = len(outcome.latencies), outcome.failures.total()
    in_time = sum(latency <= SLO_S for latency in outcome.latencies)
    return {
        "model": name,
        "callers": callers,
        "bare": bare,
        "rate": outcome.rate,
        "/ bare": outcome.rate / bare,
        "p50": percentile(outcome.latencies, 0.5) * 1000,
        "p99": percentile(outcome.latencies, 0.99) * 1000,
        "refused": failed,
        "refused, %": 100 * failed / max(1, answered + failed),
        "in time, %": 100 * in_time / max(1, answered + failed),
    }


def _budgets(rows: list[dict[str, Any]]) -> list[Budget]:
    below = [row for row in rows if row["callers"] / row["bare"] < OPTIONS.timeout_ms / 2000]
    refused = sum(row["refused"] for row in below)
    in_time = min((row["in time, %"] for row in below), default=math.nan)
    return [
        Budget("refused below capacity", 0, refused, at_least=False),
        Budget("answered within the objective, %, the least of all loops", 99.0, in_time),
    ]


if __name__ == "__main__":
    main()
