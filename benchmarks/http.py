"""Predictions over HTTP, beside a bare echo under the same web server and beside a plain route that calls the model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks._common import (
    MODEL,
    Budget,
    alternate,
    arguments,
    machine,
    median,
    percentile,
    print_table,
    ratio,
    real_rows,
    register_small_model,
    report,
    small_model,
)
from benchmarks._load import Load, generator, post, run
from benchmarks._processes import Server, serving
from benchmarks._wrk import run_wrk, wrk_is_here

CONNECTIONS: Final = (1, 16, 64, 256)
_KEEP_EVERY: Final = 97
_A_CORE: Final = 0.9
_PATHS: Final = {
    "echo": f"/predict/{MODEL}",
    "alone": f"/predict/{MODEL}",
    "mounted": f"/ml/predict/{MODEL}",
    "in-front": f"/ml/predict/{MODEL}",
    "frozen": f"/ml/predict/{MODEL}",
    "inline": f"/predict/{MODEL}",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One server in one round. Latencies are milliseconds, ``cpu_us`` the server's microseconds of CPU per answer."""

    rate: float
    p50: float
    p99: float
    failures: int
    starved: int | None = None
    wrong: int | None = None
    cpu_us: float | None = None
    cores: float | None = None
    busy: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """The request bodies, and what the bare model answers to each."""

    bodies: list[bytes]
    expected: list[int]

    @classmethod
    def real(cls) -> Traffic:
        rows = real_rows()
        bodies = [json.dumps({"inputs": {"x": row}}).encode() for row in rows.tolist()]
        return cls(bodies, small_model().predict(rows).tolist())

    def wrong(self, answers: list[tuple[int, bytes]]) -> int:
        """Count the answers that are not what the bare model says to the same row."""
        return sum(json.loads(body)["prediction"] != self.expected[index] for index, body in answers)


Measure = Callable[[Server, int, float], Measured]


def main() -> None:
    """Measure, print, write."""
    options = _options()
    seconds, rounds = (1.0, 2) if options.quick else (3.0, 3)
    connections = tuple(options.connections or ((1, 64) if options.quick else CONNECTIONS))
    print(machine())
    with _measuring(options.generator) as measure, _all_serving(options.servers) as servers:
        for server in servers:
            measure(server, 64, 1.0)
        rows = []
        for count in connections:
            found = _at(servers, count, seconds, rounds, measure)
            print_table(f"{count} connections, {rounds} × {seconds} s", found)
            rows += found
    _warn_if_crowded(rows)
    name = "http" if options.generator == "built-in" else "http_wrk"
    report(name, quick=options.quick, rows=rows, budgets=_budgets(rows))


def _options() -> Any:
    parser = arguments(__doc__)
    parser.add_argument("--generator", choices=("built-in", "wrk"), default="built-in", help="who sends the load")
    parser.add_argument("--connections", type=int, nargs="+", help=f"instead of {CONNECTIONS}")
    parser.add_argument("--servers", nargs="+", choices=_PATHS, default=list(_PATHS), help="only these")
    options = parser.parse_args()
    if options.generator == "wrk" and not wrk_is_here():
        parser.error("there is no wrk on PATH")
    return options


@contextlib.contextmanager
def _all_serving(names: Sequence[str]) -> Iterator[list[Server]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        register_small_model(Path(folder))
        yield [stack.enter_context(serving(name, Path(folder))) for name in names]


@contextlib.contextmanager
def _measuring(kind: str) -> Iterator[Measure]:
    traffic = Traffic.real()
    if kind == "wrk":
        yield partial(_by_wrk, traffic)
        return
    with generator() as process:
        yield partial(_by_generator, process, traffic)


def _by_wrk(traffic: Traffic, server: Server, connections: int, seconds: float) -> Measured:
    found = run_wrk(server.port, _PATHS[server.name], traffic.bodies, connections, seconds)
    return Measured(found.rate, found.p50_ms, found.p99_ms, found.failures)


def _by_generator(
    process: ProcessPoolExecutor, traffic: Traffic, server: Server, connections: int, seconds: float
) -> Measured:
    requests = [post(_PATHS[server.name], body) for body in traffic.bodies]
    before = server.cpu_seconds()
    outcome = process.submit(run, Load(server.port, requests, connections, seconds, _KEEP_EVERY)).result()
    after = server.cpu_seconds()
    outcome.tell_failures(f"{server.name} at {connections}")
    cpu = after - before if before is not None and after is not None else None
    answers = len(outcome.latencies)
    return Measured(
        rate=outcome.rate,
        p50=percentile(outcome.latencies, 0.50) * 1000,
        p99=percentile(outcome.latencies, 0.99) * 1000,
        failures=outcome.failures.total(),
        starved=outcome.starved,
        wrong=None if server.name == "echo" else traffic.wrong(outcome.kept),
        cpu_us=cpu / answers * 1e6 if cpu is not None and answers else None,
        cores=cpu / seconds if cpu is not None else None,
        busy=outcome.busy,
    )


def _at(servers: list[Server], connections: int, seconds: float, rounds: int, measure: Measure) -> list[dict[str, Any]]:
    sides = {server.name: partial(measure, server, connections, seconds) for server in servers}
    found = alternate(sides, rounds)
    return [_row(name, connections, found) for name in found]


def _row(name: str, connections: int, found: dict[str, list[Measured]]) -> dict[str, Any]:
    mine = found[name]
    row: dict[str, Any] = {"server": name, "connections": connections}
    row |= {key: median(getattr(each, key) for each in mine) for key in ("rate", "p50", "p99")}
    row |= {key: _median_known(getattr(each, key) for each in mine) for key in ("cpu_us", "cores", "busy")}
    row |= {key: _sum_known(getattr(each, key) for each in mine) for key in ("failures", "starved", "wrong")}
    if "echo" in found and row["cpu_us"] != "-":
        row["cpu"] = ratio([each.cpu_us or 0 for each in found["echo"]], [each.cpu_us or 1 for each in mine])
    for other in ("echo", "inline"):
        if other in found:
            row[f"/ {other}"] = ratio([each.rate for each in mine], [each.rate for each in found[other]])
    return row


def _warn_if_crowded(rows: list[dict[str, Any]]) -> None:
    """Say so where the echo did not get its core: whatever holds it back holds a slower server back less."""
    for row in rows:
        if row["server"] == "echo" and row["connections"] >= 16 and row["cores"] != "-" and row["cores"] < _A_CORE:
            where, got = f"{row['connections']} connections", f"{row['cores']:.2f} of a core"
            print(f"\nNOT QUIET at {where}: the echo got {got}; the ratios of rates to it are too good")


def _known(values: Iterator[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _median_known(values: Iterator[float | None]) -> float | str:
    known = _known(values)
    return median(known) if known else "-"


def _sum_known(values: Iterator[int | None]) -> int | str:
    known = _known(values)
    return sum(known) if known else "-"


def _budgets(rows: list[dict[str, Any]]) -> list[Budget]:
    at_64 = {row["server"]: row for row in rows if row["connections"] == 64}
    promised = [("alone", "/ echo", 0.45), ("in-front", "/ echo", 0.45), ("mounted", "/ echo", 0.28)]
    promised.append(("alone", "/ inline", 8.0))
    budgets = [
        Budget(f"{server} {column} at 64 connections", target, at_64[server][column])
        for server, column, target in promised
        if column in at_64.get(server, {})
    ]
    ours = [row for row in rows if row["server"] not in {"echo", "inline"}]
    for column in ("failures", "starved", "wrong"):
        total = sum(row[column] for row in ours if row[column] != "-")
        budgets.append(Budget(f"{column} in all runs of ours", 0, total, at_least=False))
    return budgets


if __name__ == "__main__":
    main()
