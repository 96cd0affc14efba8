"""Several host processes on one registry: how soon they follow it, and whether anybody notices that they do.

Two parts: 200 promotions and rollbacks at random under 200 requests a second over three hosts, and how long a rollback
to a version that is still loaded takes to show in the answers, by what tells of it.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, median, percentile, print_table, report
from tests import servers
from tests.hosts.fleet import MODEL, change_at_random, converged, fleet, judge, register, requests

HOSTS: Final = 3
RATE: Final = 200.0
POLL_S: Final = 1.0
LOAD_S: Final = 2.0  # what loading a version may take beside everything else


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    changes, repeats = (40, 5) if quick else (200, 40)
    print(machine())
    with servers.postgres() as postgres, servers.redis() as redis:
        storm = _storm(postgres, changes)
        rollbacks = _rollbacks(postgres, redis, repeats)
    print_table(f"{changes} changes at random, {RATE:.0f} requests/s over {HOSTS} hosts, PostgreSQL hints", [storm])
    print_table(f"rollback to a warm version, poll every {POLL_S} s, {repeats} times, from before the call", rollbacks)
    report("convergence", quick=quick, rows=[storm, *rollbacks], budgets=_budgets(storm, rollbacks))


# -- changes at random under load --------------------------------------------------------------------------


def _storm(postgres: servers.PostgresServer, count: int) -> dict[str, Any]:
    with _registry(postgres, "postgres") as (registry, folder, settings), fleet(HOSTS, folder, **settings) as hosts:
        with requests(hosts, RATE):  # every version once, and the rows of memory that the first requests take
            change_at_random(registry, 20, 0.1, random.Random(1))
            converged(registry, hosts)
        before = [(host.resident_bytes, host.descriptors) for host in hosts]
        with requests(hosts, RATE) as answers:
            made = change_at_random(registry, count, 0.1, random.Random(7))
            settled = converged(registry, hosts)
        after = [(host.resident_bytes, host.descriptors) for host in hosts]
    verdict = judge(answers, made, POLL_S + LOAD_S)
    return {
        "changes": len(made) - 1,
        "answers": verdict.answers,
        "failed": verdict.failed,
        "wrong": verdict.wrong,
        "not allowed": verdict.not_allowed,
        "p99 ms": percentile([(answer.received - answer.sent) * 1000 for answer in answers], 0.99),
        "settled s": settled,
        "MB before": sum(memory for memory, _ in before) / HOSTS / 1e6,
        "MB after": sum(memory for memory, _ in after) / HOSTS / 1e6,
        "files before": max(files for _, files in before),
        "files after": max(files for _, files in after),
    }


# -- how soon a rollback shows -----------------------------------------------------------------------------


def _rollbacks(postgres: servers.PostgresServer, redis: servers.RedisServer, repeats: int) -> list[dict[str, Any]]:
    rows = []
    with _registry(postgres, None) as (registry, folder, _):
        server = ms.ModelServer(registry, cache_dir=folder / "cache", poll_s=POLL_S)
        with server:
            rows.append(_row("in process", _times(registry, lambda: _asked(server), repeats)))
    for name, changes in (("postgres", "postgres"), ("redis", redis.url), ("poll only", None)):
        with _registry(postgres, changes) as (registry, folder, settings), fleet(1, folder, **settings) as (host,):
            with httpx.Client(base_url=f"http://127.0.0.1:{host.port}") as client:
                rows.append(_row(name, _times(registry, _asking(client), repeats)))
            converged(registry, [host])
    return rows


def _times(registry: ms.Registry, ask: Callable[[], str], repeats: int) -> list[float]:
    """Return the milliseconds from each call of ``rollback`` to the first answer of the version before."""
    found = []
    for _ in range(repeats):
        registry.promote(MODEL, "2")
        while ask() != "2":
            time.sleep(0.001)
        time.sleep(random.uniform(0, POLL_S))  # the poll is met at any point of its interval
        begun = time.perf_counter()
        registry.rollback(MODEL)
        while ask() != "1":
            pass
        found.append((time.perf_counter() - begun) * 1000)
    return found


def _asked(server: ms.ModelServer) -> str:
    return server.predict(MODEL, {"x": [1.0]}).model_version


def _asking(client: httpx.Client) -> Callable[[], str]:
    def ask() -> str:
        return str(client.post(f"/predict/{MODEL}", json={"inputs": {"x": [1.0]}}).json()["model_version"])

    return ask


def _row(name: str, times: list[float]) -> dict[str, Any]:
    return {
        "hints": name,
        "p50 ms": median(times),
        "p99 ms": percentile(times, 0.99),
        "slowest ms": max(times),
        "poll ms": POLL_S * 1000,
    }


@contextlib.contextmanager
def _registry(
    postgres: servers.PostgresServer, changes: str | None
) -> Iterator[tuple[ms.Registry, Path, dict[str, Any]]]:
    """Open a registry of three versions in a database of its own; yield it, a folder, and the settings of its hosts."""
    with tempfile.TemporaryDirectory() as name:
        url, artifacts = postgres.url(postgres.create_database()), f"{name}/artifacts"
        with ms.Registry(url, artifacts, changes=changes) as registry:
            register(registry)
            yield registry, Path(name), {"registry": url, "artifacts": artifacts, "changes": changes, "poll_s": POLL_S}


def _budgets(storm: dict[str, Any], rollbacks: list[dict[str, Any]]) -> list[Budget]:
    checks = [
        Budget(f"{what} of {storm['answers']} requests", 0, storm[what], at_least=False)
        for what in ("failed", "wrong", "not allowed")
    ]
    checks.append(Budget("memory after / before", 1.05, storm["MB after"] / storm["MB before"], at_least=False))
    files = storm["files after"] - storm["files before"]
    checks.append(Budget("descriptors more than before", 4, files, at_least=False))
    for row in rollbacks:
        limit = POLL_S * 1000 + 100 if row["hints"] == "poll only" else 100
        checks.append(Budget(f"{row['hints']}: p50 of a warm rollback, ms", limit, row["p50 ms"], at_least=False))
        checks.append(Budget(f"{row['hints']}: p99 of a warm rollback, ms", limit, row["p99 ms"], at_least=False))
    return checks


if __name__ == "__main__":
    main()
