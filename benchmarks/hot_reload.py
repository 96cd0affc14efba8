"""Versions change while requests go on: what fails, what answers wrongly, what it does to the tail."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import modelserve as ms
from benchmarks._common import (
    TELLTALE,
    Budget,
    alternate,
    arguments,
    machine,
    median,
    open_registry,
    percentile,
    print_table,
    report,
)
from benchmarks._load import Load, Outcome, generator, post, run
from benchmarks._processes import Server, serving
from modelserve.testing.models import tells, telltale

CONNECTIONS: Final = 64
_EVERY_S: Final = 0.5
_SETTLING_S: Final = 0.5  # how long after the last change its load, drain and free may go on


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One run. Latencies are milliseconds; ``seen`` counts the changes that showed in the answers."""

    rate: float
    failures: int
    wrong: int
    made: int
    seen: int
    p50_before: float
    p50_during: float
    p99_before: float
    p99_during: float
    slowest_during: float


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    quiet_s, changing_s, rounds = (1.0, 2.0, 2) if quick else (4.0, 6.0, 5)
    print(machine())
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        registry = _register(Path(name))
        process = stack.enter_context(generator())
        servers = [stack.enter_context(serving(side, Path(name))) for side in ("kept", "loaded")]
        measure = partial(_measure, process, registry, quiet_s, changing_s)
        for server in servers:
            _measure(process, registry, 0.5, 1.0, server)
        found = alternate({server.name: partial(measure, server) for server in servers}, rounds)
    rows = [_row(side, runs) for side, runs in found.items()]
    print_table(f"{CONNECTIONS} connections, a change every {_EVERY_S} s, medians of {rounds} runs", rows)
    report("hot_reload", quick=quick, rows=rows, budgets=[budget for row in rows for budget in _budgets(row)])


def _register(folder: Path) -> ms.Registry:
    registry = open_registry(folder)
    for version in (1, 2):
        registry.register(TELLTALE, str(version), telltale(version), example=np.array([[0.0], [1.0]]))
    registry.promote(TELLTALE, "1")
    return registry


def _measure(
    process: ProcessPoolExecutor, registry: ms.Registry, quiet_s: float, changing_s: float, server: Server
) -> Measured:
    values = [round(random.uniform(-100, 100), 3) for _ in range(1000)]
    requests = [post(f"/predict/{TELLTALE}", json.dumps({"inputs": {"x": [value]}}).encode()) for value in values]
    load = Load(server.port, requests, CONNECTIONS, quiet_s + changing_s + _SETTLING_S, keep_every=1)
    running = process.submit(run, load)
    time.sleep(quiet_s)
    changes = _change_for(registry, changing_s)
    outcome = running.result()
    outcome.tell_failures(server.name)
    return _evaluate(outcome, values, changes)


def _change_for(registry: ms.Registry, seconds: float) -> list[float]:
    """Promote version 2 and roll back to 1 in turn; return when each change was made. Ends on version 1."""
    changes: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(changes) % 2:
        changes.append(time.perf_counter())
        if len(changes) % 2:
            registry.promote(TELLTALE, "2")
        else:
            registry.rollback(TELLTALE)
        time.sleep(max(0.0, changes[-1] + _EVERY_S - time.perf_counter()))
    return changes


def _evaluate(outcome: Outcome, values: list[float], changes: list[float]) -> Measured:
    answers = [(values[index], json.loads(body)) for index, body in outcome.kept]
    times = list(zip(outcome.finished, outcome.latencies, strict=True))
    before = [latency * 1000 for at, latency in times if at < changes[0]]
    during = [latency * 1000 for at, latency in times if at >= changes[0]]
    versions = [answer["model_version"] for _, answer in answers]
    return Measured(
        rate=outcome.rate,
        failures=outcome.failures.total(),
        wrong=sum(_is_wrong(value, answer) for value, answer in answers),
        made=len(changes),
        seen=_seen(changes, outcome.finished, versions),
        p50_before=percentile(before, 0.50),
        p50_during=percentile(during, 0.50),
        p99_before=percentile(before, 0.99),
        p99_during=percentile(during, 0.99),
        slowest_during=max(during, default=0.0),
    )


def _is_wrong(value: float, answer: dict[str, Any]) -> bool:
    """Whether an answer is not the one that the version it names gives to this value."""
    try:
        return tells(answer["prediction"], value) != int(answer["model_version"])
    except AssertionError:
        return True


def _seen(changes: list[float], finished: list[float], versions: list[str]) -> int:
    """Count the changes after which, and before the next one, the version that was asked for answered."""
    asked = [bisect.bisect(changes, at) - 1 for at in finished]
    return len({i for i, version in zip(asked, versions, strict=True) if i >= 0 and version == "21"[i % 2]})


def _row(side: str, runs: list[Measured]) -> dict[str, Any]:
    totals, latencies = ("failures", "wrong", "made", "seen"), ("p50_before", "p50_during", "p99_before", "p99_during")
    row: dict[str, Any] = {"previous": side, "rate": median(run.rate for run in runs)}
    row |= {key: sum(getattr(run, key) for run in runs) for key in totals}
    row |= {key: median(getattr(run, key) for run in runs) for key in latencies}
    row["slowest"] = max(run.slowest_during for run in runs)
    row["p99 ratio"] = median(run.p99_during / run.p99_before for run in runs)
    return row


def _budgets(row: dict[str, Any]) -> list[Budget]:
    side = row["previous"]
    return [
        Budget(f"{side}: failed requests", 0, row["failures"], at_least=False),
        Budget(f"{side}: answers of another version than they name", 0, row["wrong"], at_least=False),
        Budget(f"{side}: changes that showed in the answers, of those made", row["made"], row["seen"]),
        Budget(f"{side}: p99 during changes / before", 1.5, row["p99 ratio"], at_least=False),
    ]


if __name__ == "__main__":
    main()
