"""Open-loop load from half to three times the capacity: who is answered in time, and how the others are told."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import math
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, open_registry, percentile, print_table, report
from benchmarks._models import Sleeper

LOADS: Final = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
SLO_S: Final = 0.1
ROWS: Final = {"x": [1.0]}


@dataclasses.dataclass
class Seen:
    """What the requests of one load came to; times in seconds, latencies from when a request was due."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    refusals: list[float] = dataclasses.field(default_factory=list)
    retry_after: list[float] = dataclasses.field(default_factory=list)
    errors: Counter[str] = dataclasses.field(default_factory=Counter)


def main() -> None:
    """Measure, print, write, and draw if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, help="draw the curve into this file (needs matplotlib)")
    options = parser.parse_args()
    print(machine())
    capacity, rows = uvloop.run(_curve(1.0 if options.quick else 8.0))
    print_table(f"offered load in multiples of {capacity:,.0f} rows/s; times in milliseconds", rows)
    report("overload", quick=options.quick, rows=rows, budgets=_budgets(rows))
    if options.plot:
        _draw(rows, options.plot)


async def _curve(seconds: float) -> tuple[float, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as name:
        registry = open_registry(Path(name))
        example = np.array([[1.0]])
        registry.register("m", "1", Sleeper(), example=example, framework="sklearn", format="joblib")
        registry.promote("m", "1")
        models = {"m": ms.ModelOptions(executor="process", allow_pickle=True)}
        async with ms.AsyncModelServer(registry, models, cache_dir=Path(name) / "cache") as server:
            gc.freeze()  # as docs/how-to/deploy.md advises: a full collection stops the loop for as long as the SLO
            capacity = _capacity(server)
            return capacity, [
                _row(load, capacity, seconds, await _at(server, load * capacity, seconds)) for load in LOADS
            ]


def _capacity(server: ms.AsyncModelServer) -> float:
    """Return rows per second in batches of the size in force, by what the model itself takes: no overhead counts."""
    pool = server.status()[0].pool
    assert pool is not None
    rows = pool.batches.max_rows
    return rows / (0.005 + 0.0002 * rows)


async def _at(server: ms.AsyncModelServer, rate: float, seconds: float) -> Seen:
    """Send requests at random moments of a given mean rate, whatever becomes of the ones before."""
    seen, chance = Seen(), random.Random(1)
    tasks: set[asyncio.Task[None]] = set()
    begin = time.perf_counter()
    due = begin
    while due < begin + seconds:
        due += chance.expovariate(rate)
        ahead = due - time.perf_counter()
        if ahead > 0.0005:
            await asyncio.sleep(ahead)
        elif len(tasks) % 16 == 0:
            await asyncio.sleep(0)
        task = asyncio.create_task(_one(server, due, seen))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    return seen


async def _one(server: ms.AsyncModelServer, due: float, seen: Seen) -> None:
    began = time.perf_counter()
    try:
        await server.predict("m", ROWS)
    except ms.Overloaded as error:
        seen.refusals.append(time.perf_counter() - began)
        seen.retry_after.append(error.retry_after or 0.0)
    except ms.ModelServeError as error:
        seen.errors[type(error).__name__] += 1
    else:
        seen.latencies.append(time.perf_counter() - due)


def _row(load: float, capacity: float, seconds: float, seen: Seen) -> dict[str, Any]:
    sent = len(seen.latencies) + len(seen.refusals) + seen.errors.total()
    in_time = sum(latency <= SLO_S for latency in seen.latencies)
    return {
        "load": load,
        "offered/s": sent / seconds,
        "answered/s": len(seen.latencies) / seconds,
        "goodput / capacity": in_time / seconds / capacity,
        "p50": percentile(seen.latencies, 0.5) * 1000,
        "p99": percentile(seen.latencies, 0.99) * 1000,
        "refused": len(seen.refusals) / sent,
        "refusal_p99": percentile(seen.refusals, 0.99) * 1000 if seen.refusals else 0.0,
        "retry_after": percentile(seen.retry_after, 0.5) * 1000 if seen.refusals else 0.0,
        "errors": seen.errors.total(),
    }


def _budgets(rows: list[dict[str, Any]]) -> list[Budget]:
    at = {row["load"]: row for row in rows}
    budgets = [
        Budget("goodput at twice the capacity, share of it", 0.90, at[2.0]["goodput / capacity"]),
        Budget("p99 of the answered at twice the capacity, ms", SLO_S * 1000, at[2.0]["p99"], at_least=False),
        Budget("p99 of the time to refuse, ms", 5.0, at[2.0]["refusal_p99"], at_least=False),
        Budget("other errors", 0, sum(row["errors"] for row in rows), at_least=False),
    ]
    return [*budgets, *(Budget(f"refused at {load}", 0.0, at[load]["refused"], at_least=False) for load in (0.5, 0.8))]


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415  # only for the picture in the documentation

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    loads = [row["load"] for row in rows]
    figure, (goodput, latency) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    goodput.plot(loads, [min(load, 1.0) for load in loads], "--", color="0.6", label="the most that is possible")
    goodput.plot(loads, [row["goodput / capacity"] for row in rows], "o-", label="answered within 100 ms")
    goodput.set(xlabel="offered load / capacity", ylabel="goodput / capacity", ylim=(0, 1.1))
    latency.axhline(SLO_S * 1000, ls="--", color="0.6", label="objective")
    latency.plot(loads, [row["p99"] for row in rows], "o-", label="p99 of the answered")
    latency.plot(loads, [row["p50"] for row in rows], "o-", label="p50 of the answered")
    latency.set(xlabel="offered load / capacity", ylabel="milliseconds", ylim=(0, math.ceil(SLO_S * 1300)))
    for axes in (goodput, latency):
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
