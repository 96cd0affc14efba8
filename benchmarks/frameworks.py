"""Each framework served beside itself called bare, batch by batch; and a forest as it is beside the same compiled.

A batch is one ``predict_many`` of a lone caller: validated, stacked, run, unstacked. ``adapter`` is the adapter's part
of that alone, called on stacked columns, and ``validation`` what the rows cost each by itself, in batches or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
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
    report,
)
from benchmarks._load import Load, generator, post, run
from benchmarks._networks import (
    Network,
    boosting,
    keras_mlp,
    logistic,
    onnx_forest,
    sklearn_forest,
    torch_conv,
    torch_mlp,
)
from benchmarks._processes import Server, serving
from modelserve import plugins
from modelserve.types import Runtime

SIZES: Final = (1, 8, 64)
COMPILED_SIZES: Final = (1, 32, 256)
TURNING_SIZES: Final = (1, 32, 256, 4096)
CONNECTIONS: Final = (1, 64)
SLOW_US: Final = 10_000
PATIENT: Final[dict[str, Any]] = {"timeout_ms": 60_000, "slo_ms": 30_000, "max_batch_size": 256}


@dataclasses.dataclass(frozen=True, slots=True)
class DownloadBudget:
    """How long each side is measured, and how often."""

    seconds: float
    rounds: int


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """A started server with one model, and the loop that it lives in."""

    server: ms.AsyncModelServer
    runner: asyncio.Runner
    start_s: float

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    effort, crowd = (
        (DownloadBudget(0.2, 2), DownloadBudget(1.0, 2)) if quick else (DownloadBudget(1.0, 5), DownloadBudget(3.0, 3))
    )
    print(machine())
    batches, starts = [], []
    for make in (torch_mlp, torch_conv, keras_mlp, onnx_forest):
        rows, started = _framework(make(), effort)
        batches += rows
        starts += started
    compiled = _compiled(effort)
    turning = [row for network in (logistic(), boosting(), sklearn_forest()) for row in _turning(network, effort)]
    over_http = _over_http(crowd)
    print_table(f"microseconds a batch (medians of {effort.rounds} × {effort.seconds} s)", batches)
    print_table("start of a replica: seconds until it is proven, and memory of its process in MB", starts)
    print_table("a forest of 200 trees, microseconds a batch", compiled)
    print_table("estimators and what they are compiled to, called directly, microseconds a batch", turning)
    print_table("the forest over HTTP, answers per second", over_http)
    everything = [*batches, *starts, *compiled, *turning, *over_http]
    report("frameworks", quick=quick, rows=everything, budgets=_budgets(batches, compiled))


# -- each framework ----------------------------------------------------------------------------------------


def _framework(network: Network, effort: DownloadBudget) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        registry = _registered(Path(name), network)
        sides = {
            kind: stack.enter_context(_started(registry, Path(name), network, executor=kind))
            for kind in ("thread", "process")
        }
        infer = _adapter(Path(name), registry)
        measured = [_batch_row(network, size, infer, sides, effort) for size in SIZES]
        return measured, [_start_row(network, sides)]


def _batch_row(
    network: Network, size: int, infer: Callable[[Any], Any], sides: dict[str, Side], effort: DownloadBudget
) -> dict[str, Any]:
    batch = network.rows[:size]
    calls: dict[str, Callable[[], float]] = {
        "bare": partial(_call_us, lambda: network.bare(batch), effort.seconds),
        "adapter": partial(_call_us, lambda: infer(batch), effort.seconds),
    }
    calls["validation"] = partial(_call_us, _validation(batch), effort.seconds)
    calls |= {kind: partial(_served_us, side, batch, effort.seconds) for kind, side in sides.items()}
    found = alternate(calls, effort.rounds)
    row: dict[str, Any] = {"model": network.name, "rows": size, "bare": median(found["bare"])}
    row["validation"] = median(found["validation"])
    for name in ("adapter", *sides):
        over = [mine - bare for mine, bare in zip(found[name], found["bare"], strict=True)]
        row |= {f"{name} over": median(over), f"bare / {name}": ratio(found["bare"], found[name])}
    return row | {"bare rows/s": size / row["bare"] * 1e6, "thread rows/s": size / median(found["thread"]) * 1e6}


def _start_row(network: Network, sides: dict[str, Side]) -> dict[str, Any]:
    pool = sides["process"].server.status()[0].pool
    assert pool is not None
    return {
        "model": network.name,
        "thread": sides["thread"].start_s,
        "process": sides["process"].start_s,
        "memory": _resident_mb(pool.replicas[0].detail["pid"]),
    }


def _resident_mb(pid: int) -> float | str:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return "-"
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# -- a forest, compiled ------------------------------------------------------------------------------------


def _compiled(effort: DownloadBudget) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, network in _forests().items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sides[name] = stack.enter_context(_started(_registered(folder, network), folder, network))
        plain = sklearn_forest()
        return [_compiled_row(plain, size, sides, effort) for size in COMPILED_SIZES]


def _compiled_row(plain: Network, size: int, sides: dict[str, Side], effort: DownloadBudget) -> dict[str, Any]:
    batch = plain.rows[:size]
    calls: dict[str, Callable[[], float]] = {"bare": partial(_call_us, lambda: plain.bare(batch), effort.seconds)}
    calls |= {name: partial(_served_us, side, batch, effort.seconds) for name, side in sides.items()}
    found = alternate(calls, effort.rounds)
    return (
        {"rows": size}
        | {name: median(spent) for name, spent in found.items()}
        | {"plain / onnx": ratio(found["plain"], found["onnx"])}
    )


def _turning(network: Network, effort: DownloadBudget) -> list[dict[str, Any]]:
    """Find out where compiling ends to gain: the more rows, the less the way to the numbers counts."""
    network = dataclasses.replace(network, register={"optimize": "onnx"})
    with tempfile.TemporaryDirectory() as name:
        infer = _adapter(Path(name), _registered(Path(name), network))
        return [_turning_row(network, size, infer, effort) for size in TURNING_SIZES]


def _turning_row(network: Network, size: int, infer: Callable[[Any], Any], effort: DownloadBudget) -> dict[str, Any]:
    batch = np.resize(network.rows, (size, *network.rows.shape[1:]))
    calls = {"bare": lambda: network.bare(batch), "onnx": lambda: infer(batch)}
    found = alternate({name: partial(_call_us, call, effort.seconds) for name, call in calls.items()}, effort.rounds)
    row: dict[str, Any] = {"model": network.name, "rows": size}
    row |= {name: median(spent) for name, spent in found.items()}
    return row | {"bare / onnx": ratio(found["bare"], found["onnx"])}


def _over_http(effort: DownloadBudget) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        load = stack.enter_context(generator())
        servers: dict[str, Server] = {}
        for name, network in _forests().items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _registered(folder, network)
            servers[name] = stack.enter_context(serving("alone", folder))
        bodies = [orjson.dumps({"inputs": {"x": row}}) for row in sklearn_forest().rows.tolist()]
        requests = [post(f"/predict/{MODEL}", body) for body in bodies]
        return [_http_row(load, servers, requests, count, effort) for count in CONNECTIONS]


def _http_row(
    load: ProcessPoolExecutor,
    servers: dict[str, Server],
    requests: list[bytes],
    count: int,
    effort: DownloadBudget,
) -> dict[str, Any]:
    def measure(server: Server) -> Any:
        outcome = load.submit(run, Load(server.port, requests, count, effort.seconds, 1000)).result()
        outcome.tell_failures(f"{server.name} at {count}")
        return outcome

    found = alternate({name: partial(measure, server) for name, server in servers.items()}, effort.rounds)
    row: dict[str, Any] = {"connections": count}
    for name, outcomes in found.items():
        row |= {
            name: median(each.rate for each in outcomes),
            f"{name} p99 ms": median(percentile(each.latencies, 0.99) * 1000 for each in outcomes),
            f"{name} failures": sum(each.failures.total() for each in outcomes),
        }
    plain, onnx = ([each.rate for each in found[name]] for name in ("plain", "onnx"))
    return row | {"onnx / plain": ratio(onnx, plain)}


def _forests() -> dict[str, Network]:
    return {"plain": sklearn_forest(), "onnx": sklearn_forest(optimize="onnx")}


# -- the sides ---------------------------------------------------------------------------------------------


def _registered(folder: Path, network: Network) -> ms.Registry:
    registry = open_registry(folder)
    registry.register(MODEL, "1", network.model, example=network.rows[:4], **network.register)
    registry.promote(MODEL, "1")
    return registry


@contextlib.contextmanager
def _started(registry: ms.Registry, folder: Path, network: Network, **options: Any) -> Iterator[Side]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        served = {MODEL: ms.ModelOptions(**PATIENT, **network.allowed, **options)}
        server = ms.AsyncModelServer(registry, served, cache_dir=folder / "cache")
        started = time.perf_counter()
        runner.run(server.start())
        try:
            yield Side(server, runner, time.perf_counter() - started)
        finally:
            runner.run(server.close())


def _adapter(folder: Path, registry: ms.Registry) -> Callable[[Any], Any]:
    """Return the adapter's own part: the loaded model, called on a stacked column."""
    version = registry.production(MODEL)
    path = folder / "artifacts" / version.artifact.key
    model = plugins.framework(version.framework).load(
        path, version.artifact.format, version.load_options, Runtime(allow_code=True)
    )
    return lambda batch: model.infer({"x": batch})


def _validation(batch: Any) -> Callable[[], Any]:
    validate = ms.Signature.infer({"x": batch}).validate
    records = [{"x": row} for row in batch]
    return lambda: [validate(record) for record in records]


def _call_us(call: Callable[[], Any], seconds: float) -> float:
    """Return the median of the microseconds that a call takes."""
    spent, until = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        call()
        spent.append(time.perf_counter() - started)
    return percentile(spent, 0.5) * 1e6


def _served_us(side: Side, batch: Any, seconds: float) -> float:
    records = [{"x": row} for row in batch]
    return side.run(_many(side.server, records, seconds))  # type: ignore[no-any-return]


async def _many(server: ms.AsyncModelServer, records: list[dict[str, Any]], seconds: float) -> float:
    spent, until = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        await server.predict_many(MODEL, records)
        spent.append(time.perf_counter() - started)
    return percentile(spent, 0.5) * 1e6


def _budgets(batches: list[dict[str, Any]], compiled: list[dict[str, Any]]) -> list[Budget]:
    budgets = []
    for row in batches:
        what = f"{row['model']}, {row['rows']} rows"
        if row["bare"] >= SLOW_US:
            budgets.append(Budget(f"share of bare, {what}", 0.95, row["bare / thread"]))
        else:
            over = row["thread over"] - row["validation"]
            budgets.append(Budget(f"microseconds on top of a batch, {what}", 150.0, over, at_least=False))
    budgets.append(Budget("one row of the forest: times quicker compiled", 10.0, compiled[0]["plain / onnx"]))
    return budgets


if __name__ == "__main__":
    main()
