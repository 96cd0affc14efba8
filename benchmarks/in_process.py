"""Predictions inside the host's process, beside the bare model called directly on batches of the same size."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

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
    small_model,
)

CALLERS: Final = (1, 16, 64, 256)
LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """A started server and the loop that it lives in."""

    server: ms.AsyncModelServer
    runner: asyncio.Runner

    def run(self, work: Coroutine[Any, Any, float]) -> float:
        return self.runner.run(work)


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    seconds, rounds = (0.3, 3) if quick else (1.5, 7)
    print(machine())
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        register_small_model(Path(name))
        served = {loop: stack.enter_context(_serving(Path(name), loop)) for loop in LOOPS}
        crowds = [_crowd(served, callers, seconds, rounds) for callers in CALLERS]
        lone = _lone(served, 300 if quick else 2000, rounds)
    print_table(f"predictions per second (medians of {rounds} × {seconds} s)", crowds)
    print_table("one lone request, microseconds (medians of p50)", lone)
    report("in_process", quick=quick, rows=[*crowds, *lone], budgets=_budgets(crowds, lone))


@contextlib.contextmanager
def _serving(folder: Path, loop: str) -> Iterator[Served]:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        server = ms.AsyncModelServer(open_registry(folder), cache_dir=folder / "cache")
        runner.run(server.start())
        try:
            yield Served(server, runner)
        finally:
            runner.run(server.close())


# -- a crowd of callers ------------------------------------------------------------------------------------


def _crowd(served: dict[str, Served], callers: int, seconds: float, rounds: int) -> dict[str, Any]:
    sides: dict[str, Callable[[], float]] = {"bare": partial(_bare_rate, callers, seconds)}
    for loop, side in served.items():
        sides[loop] = partial(_served_rate, side, callers, seconds)
    found = alternate(sides, rounds)
    row: dict[str, Any] = {"callers": callers} | {name: median(rates) for name, rates in found.items()}
    return row | {f"{loop} / bare": ratio(found[loop], found["bare"]) for loop in served}


def _bare_rate(rows: int, seconds: float) -> float:
    predict, batch = small_model().predict, real_rows()[:rows]
    started = now = time.perf_counter()
    done = 0
    while now < started + seconds:
        predict(batch)
        done += rows
        now = time.perf_counter()
    return done / (now - started)


def _served_rate(side: Served, callers: int, seconds: float) -> float:
    return side.run(_closed_loop(side.server, callers, seconds))


async def _closed_loop(server: ms.AsyncModelServer, callers: int, seconds: float) -> float:
    """Let so many callers predict one row after the other; return answers per second."""
    inputs = itertools.cycle([{"x": row} for row in real_rows().tolist()])
    started = time.perf_counter()
    end = started + seconds

    async def caller() -> int:
        done = 0
        while time.perf_counter() < end:
            await server.predict(MODEL, next(inputs))
            done += 1
        return done

    done = await asyncio.gather(*(caller() for _ in range(callers)))
    return sum(done) / (time.perf_counter() - started)


# -- a lone caller -----------------------------------------------------------------------------------------


def _lone(served: dict[str, Served], calls: int, rounds: int) -> list[dict[str, Any]]:
    sides: dict[str, Callable[[], float]] = {"bare": partial(_bare_microseconds, calls)}
    for loop, side in served.items():
        sides[loop] = partial(_served_microseconds, side, calls)
    found = alternate(sides, rounds)
    return [
        {
            "loop": loop,
            "bare": median(found["bare"]),
            "served": median(found[loop]),
            "overhead": median(mine - bare for mine, bare in zip(found[loop], found["bare"], strict=True)),
        }
        for loop in served
    ]


def _bare_microseconds(calls: int) -> float:
    predict, rows = small_model().predict, real_rows()
    spent = []
    for i in range(calls):
        row = rows[i % len(rows)][None]
        started = time.perf_counter()
        predict(row)
        spent.append(time.perf_counter() - started)
    return percentile(spent, 0.5) * 1e6


def _served_microseconds(side: Served, calls: int) -> float:
    return side.run(_one_by_one(side.server, calls))


async def _one_by_one(server: ms.AsyncModelServer, calls: int) -> float:
    rows = [{"x": row} for row in real_rows().tolist()]
    spent = []
    for i in range(calls):
        started = time.perf_counter()
        await server.predict(MODEL, rows[i % len(rows)])
        spent.append(time.perf_counter() - started)
    return percentile(spent, 0.5) * 1e6


def _budgets(crowds: list[dict[str, Any]], lone: list[dict[str, Any]]) -> list[Budget]:
    at_64 = next(row for row in crowds if row["callers"] == 64)
    shares = [Budget(f"share of the bare model at 64 callers, {loop}", 0.30, at_64[f"{loop} / bare"]) for loop in LOOPS]
    overheads = [
        Budget(f"microseconds on top of a lone call, {row['loop']}", 150.0, row["overhead"], at_least=False)
        for row in lone
    ]
    return shares + overheads


if __name__ == "__main__":
    main()
