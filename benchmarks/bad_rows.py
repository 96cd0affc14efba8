"""Sixty callers in a closed loop, two rows of a hundred such that the model raises: what is left for the good ones."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, open_registry, percentile, print_table, report
from benchmarks._models import Choosy

CALLERS: Final = 60
SHARE: Final = 0.02  # of bad rows
Draw = Callable[[random.Random, int], float]


@dataclasses.dataclass
class Seen:
    """What the good rows came to, how many rows were settled at all, and in how many runs."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    settled: int = 0
    runs: int = 0


def clean(_: random.Random, number: int) -> float:
    """Never draw a bad row."""
    return float(number)


def ten(chance: random.Random, number: int) -> float:
    """Draw one of ten bad rows now and then."""
    return -float(chance.randrange(1, 11)) if chance.random() < SHARE else float(number)


def distinct(chance: random.Random, number: int) -> float:
    """Draw a bad row that never was before now and then."""
    return -float(number) if chance.random() < SHARE else float(number)


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__).parse_args()
    print(machine())
    rows = uvloop.run(_all(2.0 if options.quick else 8.0))
    print_table("answers to good rows a second; times in milliseconds", rows)
    report("bad_rows", quick=options.quick, rows=rows, budgets=_budgets(rows))


async def _all(seconds: float) -> list[dict[str, Any]]:
    warm_up = 1.5 * seconds
    found = []
    for name, fixed, per_row in (("60 ms a batch", 0.06, 0.0), ("1 ms a row", 0.0, 0.001)):
        for draw in (clean, ten, distinct):
            seen = await _served(Choosy(fixed, per_row), draw, warm_up, seconds)
            found.append({"model": name, "bad rows": draw.__name__} | _figures(seen, seconds))
    return found


async def _served(model: Any, draw: Draw, warm_up: float, seconds: float) -> Seen:
    """Serve a model to the crowd; what happens within the warm-up is not counted."""
    with tempfile.TemporaryDirectory() as name:
        registry = open_registry(Path(name))
        registry.register("m", "1", model, example=np.array([[1.0]]), framework="sklearn", format="joblib")
        registry.promote("m", "1")
        models = {"m": ms.ModelOptions(allow_pickle=True)}
        async with ms.AsyncModelServer(registry, models, cache_dir=Path(name) / "cache") as server:
            gc.freeze()  # as docs/how-to/deploy.md advises
            return await _crowd(server, draw, warm_up, seconds)


async def _crowd(server: ms.AsyncModelServer, draw: Draw, warm_up: float, seconds: float) -> Seen:
    seen, chance = Seen(), random.Random(1)
    numbers = iter(range(1, 100_000_000))
    begin = time.perf_counter() + warm_up

    async def caller() -> None:
        await asyncio.sleep(chance.random() / 20)
        while (now := time.perf_counter()) < begin + seconds:
            await _one(server, draw(chance, next(numbers)), seen if now >= begin else Seen())

    tasks = [asyncio.create_task(caller()) for _ in range(CALLERS)]
    await asyncio.sleep(warm_up)
    before = _runs(server)
    await asyncio.gather(*tasks)
    seen.runs = _runs(server) - before
    return seen


async def _one(server: ms.AsyncModelServer, value: float, seen: Seen) -> None:
    began = time.perf_counter()
    error: Exception | None = None
    try:
        await server.predict("m", {"x": [value]})
    except ms.ModelServeError as raised:
        error = raised
    took = time.perf_counter() - began
    seen.settled += error is None or isinstance(error, ms.InferenceFailed)
    if value > 0 and error is None:
        seen.latencies.append(took)
    elif value > 0:
        seen.errors[type(error).__name__] += 1
    # A client that was refused comes back when it may; no client sends its next row in no time.
    await asyncio.sleep((error.retry_after or 0.0) if isinstance(error, ms.Overloaded) else 0.001)


def _runs(server: ms.AsyncModelServer) -> int:
    pool = server.status()[0].pool
    assert pool is not None
    return pool.batches.batches


def _figures(seen: Seen, seconds: float) -> dict[str, Any]:
    good = len(seen.latencies) + seen.errors.total()
    return {
        "good/s": len(seen.latencies) / seconds,
        "p50": percentile(seen.latencies, 0.5) * 1000,
        "p99": percentile(seen.latencies, 0.99) * 1000,
        "rows a run": seen.settled / max(1, seen.runs),
        "refused": seen.errors["Overloaded"] / good,
        "too late": seen.errors["DeadlineExceeded"] / good,
    }


def _budgets(rows: list[dict[str, Any]]) -> list[Budget]:
    at = {(row["model"], row["bad rows"]): row for row in rows}
    dear, cheap = "60 ms a batch", "1 ms a row"
    budgets = []
    for model, kind in ((dear, "ten"), (cheap, "ten"), (cheap, "distinct")):
        bare, found = at[model, "clean"], at[model, kind]
        what = f"{model}, {kind} bad rows"
        budgets += [
            Budget(f"{what}: p99 beside that without", 2.0, found["p99"] / bare["p99"], at_least=False),
            Budget(f"{what}: good rows a second beside those without", 0.6, found["good/s"] / bare["good/s"]),
        ]
    found = at[dear, "distinct"]
    return [
        *budgets,
        Budget(f"{dear}, distinct bad rows: rows a run", 5.0, found["rows a run"]),
        Budget(f"{dear}, distinct bad rows: share of good ones too late", 0.02, found["too late"], at_least=False),
    ]


if __name__ == "__main__":
    main()
