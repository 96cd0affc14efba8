"""Models in threads and in processes, beside the bare model called directly on batches of the largest size allowed.

There are twice as many callers as rows in such a batch, so that the next one can form while one runs.
"""

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
    report,
    small_model,
)
from benchmarks._models import Subject, forest, mlp, pictures

PATIENT: Final[dict[str, Any]] = {
    "allow_pickle": True,
    "timeout_ms": 30_000,
    "slo_ms": 10_000,
}  # nothing is refused here
SIDES: Final = {
    "thread": ms.ModelOptions(**PATIENT),
    "process": ms.ModelOptions(executor="process", **PATIENT),
}
TWO: Final = ms.ModelOptions(executor="process", replicas=2, **PATIENT)
SLOW_S: Final = 0.005


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """A started server with one model, and the loop that it lives in."""

    server: ms.AsyncModelServer
    runner: asyncio.Runner
    inputs: list[dict[str, Any]]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    seconds, rounds = (0.5, 2) if quick else (2.0, 5)
    print(machine())
    subjects = [Subject("scaler + logistic", small_model(), real_rows()), forest(), mlp(), pictures()]
    measured = [_subject(subject, seconds, rounds, 100 if quick else 500) for subject in subjects]
    crowds, lone = [list(rows) for rows in zip(*measured, strict=True)]
    scaled = _scaling(dataclasses.replace(forest(), callers=256), seconds, rounds)
    print_table(f"rows per second (medians of {rounds} × {seconds} s)", crowds)
    print_table("one lone request, microseconds (medians of p50)", lone)
    print_table("one and two worker processes, rows per second", [scaled])
    report("execution", quick=quick, rows=[*crowds, *lone, scaled], budgets=_budgets(crowds, lone, scaled))


def _subject(subject: Subject, seconds: float, rounds: int, calls: int) -> tuple[dict[str, Any], dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(_serving(subject, options)) for name, options in SIDES.items()}
        rate: dict[str, Callable[[], Any]] = {
            name: partial(_served_rate, side, subject, seconds) for name, side in sides.items()
        }
        rate["bare"] = partial(_bare_rate, subject, seconds)
        found = alternate(rate, rounds)
        spent: dict[str, Callable[[], float]] = {name: partial(_served_us, side, calls) for name, side in sides.items()}
        spent["bare"] = partial(_bare_us, subject, calls)
        alone = alternate(spent, rounds)
    return _crowd_row(subject, found), _lone_row(subject, alone)


def _crowd_row(subject: Subject, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Compare each side with the bare model at the size of the batches that formed on it."""
    row: dict[str, Any] = {"model": subject.name, "callers": subject.callers, "bare": median(found["bare"])}
    row["bare_ms"] = subject.largest / row["bare"] * 1000
    for name in SIDES:
        rates = [rate for rate, _ in found[name]]
        row |= {
            name: median(rates),
            f"{name}_batch": median(rows for _, rows in found[name]),
            f"{name} / bare": ratio(rates, found["bare"]),
        }
    return row


def _lone_row(subject: Subject, alone: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": subject.name, "bare": median(alone["bare"])}
    for name in SIDES:
        over = [mine - bare for mine, bare in zip(alone[name], alone["bare"], strict=True)]
        row |= {name: median(alone[name]), f"{name} over": median(over)}
    return row


def _scaling(subject: Subject, seconds: float, rounds: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(_serving(subject, SIDES["process"]))
        two = stack.enter_context(_serving(subject, TWO))
        sides = {name: partial(_served_rate, side, subject, seconds) for name, side in (("one", one), ("two", two))}
        found = {name: [rate for rate, _ in pairs] for name, pairs in alternate(sides, rounds).items()}
    row = {"model": subject.name, "one": median(found["one"]), "two": median(found["two"])}
    return row | {"two / one": ratio(found["two"], found["one"])}


# -- the two kinds of sides --------------------------------------------------------------------------------


@contextlib.contextmanager
def _serving(subject: Subject, options: ms.ModelOptions) -> Iterator[Side]:
    with tempfile.TemporaryDirectory() as name, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        registry = open_registry(Path(name))
        kind: dict[str, Any] = {"framework": "sklearn", "format": "joblib"} if subject.pickled else {}
        registry.register("m", "1", subject.model, example=subject.rows[:4], **kind)
        registry.promote("m", "1")
        sized = options.model_copy(update={"max_batch_size": subject.largest})
        server = ms.AsyncModelServer(registry, {"m": sized}, cache_dir=Path(name) / "cache")
        runner.run(server.start())
        try:
            yield Side(server, runner, [{"x": row} for row in subject.rows])
        finally:
            runner.run(server.close())


def _served_rate(side: Side, subject: Subject, seconds: float) -> tuple[float, float]:
    """Let the callers predict one row after the other; return rows per second and rows per batch."""
    return side.run(_closed_loop(side, subject.callers, seconds))  # type: ignore[no-any-return]


async def _closed_loop(side: Side, callers: int, seconds: float) -> tuple[float, float]:
    inputs = itertools.cycle(side.inputs)
    before = _batches(side.server)
    started = time.perf_counter()
    end = started + seconds

    async def caller() -> int:
        done = 0
        while time.perf_counter() < end:
            await side.server.predict("m", next(inputs))
            done += 1
        return done

    done = sum(await asyncio.gather(*(caller() for _ in range(callers))))
    return done / (time.perf_counter() - started), done / (_batches(side.server) - before)


def _batches(server: ms.AsyncModelServer) -> int:
    pool = server.status()[0].pool
    assert pool is not None
    return pool.batches.batches


def _bare_rate(subject: Subject, seconds: float) -> float:
    predict, batch = subject.model.predict, subject.rows[: subject.largest]
    started = now = time.perf_counter()
    done = 0
    while now < started + seconds:
        predict(batch)
        done += len(batch)
        now = time.perf_counter()
    return done / (now - started)


def _served_us(side: Side, calls: int) -> float:
    return side.run(_one_by_one(side, calls))  # type: ignore[no-any-return]


async def _one_by_one(side: Side, calls: int) -> float:
    spent = []
    for i in range(calls):
        started = time.perf_counter()
        await side.server.predict("m", side.inputs[i % len(side.inputs)])
        spent.append(time.perf_counter() - started)
    return percentile(spent, 0.5) * 1e6


def _bare_us(subject: Subject, calls: int) -> float:
    predict, rows, spent = subject.model.predict, subject.rows, []
    for i in range(calls):
        row = rows[i % len(rows)][None]
        started = time.perf_counter()
        predict(row)
        spent.append(time.perf_counter() - started)
    return percentile(spent, 0.5) * 1e6


def _budgets(crowds: list[dict[str, Any]], lone: list[dict[str, Any]], scaled: dict[str, Any]) -> list[Budget]:
    budgets = []
    for row in crowds:
        tensors = row["model"].startswith("pictures")
        if tensors or row["bare_ms"] >= SLOW_S * 1000:
            target = 0.80 if tensors else 0.95
            budgets += [
                Budget(f"share of bare, {row['model']}, {name}", target, row[f"{name} / bare"]) for name in SIDES
            ]
    for name, most in (("thread", 150.0), ("process", 300.0)):
        budgets.append(
            Budget(f"microseconds on top of a lone call, {name}", most, lone[0][f"{name} over"], at_least=False)
        )
    return [*budgets, Budget("two workers over one, forest", 1.7, scaled["two / one"])]


if __name__ == "__main__":
    main()
