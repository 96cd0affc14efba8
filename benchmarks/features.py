"""Features of two entities, 30 each, read from Redis on loopback for requests that arrive a thousand a second.

Beside it the bare driver: each request its own pipeline of two HMGETs. Both in this process, on uvloop, with the same
connections to the same server; latencies are counted from the moment a request should have arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import redis.asyncio
import uvloop
from sklearn.linear_model import LinearRegression

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, median, open_registry, percentile, print_table, report
from modelserve import plugins
from modelserve.events import Observers
from modelserve.features.plan import FeaturePlan
from modelserve.features.reader import READS_AT_ONCE, FeatureReader
from modelserve.signature import Signature
from tests import servers

RATE: Final = 1000
FEATURES: Final = 30
ENTITIES: Final = ("user_id", "item_id")
KEYS: Final = 2000
NAMES: Final = {entity: [f"{entity}_{i}" for i in range(FEATURES)] for entity in ENTITIES}
BUDGET_MS: Final = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds of the requests of one round, and how many of them got a default."""

    values: Sequence[float]
    degraded: int

    def at(self, share: float) -> float:
        return percentile(self.values, share)


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    seconds, rounds = (1.0, 2) if quick else (5.0, 5)
    print(machine())
    with tempfile.TemporaryDirectory() as name, servers.redis() as server:
        publish(server.url)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measured(server.url, Path(name), seconds, rounds))
    rows = [
        {
            "what": what,
            "p50 ms": median(each.at(0.5) for each in several),
            "p99 ms": median(each.at(0.99) for each in several),
            "p99.9 ms": median(each.at(0.999) for each in several),
            "by default": sum(each.degraded for each in several),
        }
        for what, several in found.items()
    ]
    print_table(f"{RATE} requests/s, {FEATURES} features x {len(ENTITIES)} (medians of {rounds} x {seconds} s)", rows)
    p99 = {row["what"]: float(str(row["p99 ms"])) for row in rows}
    budgets = [
        Budget("feature read, p99 ms", BUDGET_MS, p99["read"], at_least=False),
        Budget("feature read, p99 beside bare HMGETs", 1.5, p99["read"] / p99["bare HMGET"], at_least=False),
    ]
    report("features", quick=quick, rows=rows, budgets=budgets)


def publish(url: str) -> None:
    """Write the rows of both entities."""
    numbers = np.random.default_rng(20)
    with ms.FeatureWriter(url) as writer:
        for entity, names in NAMES.items():
            columns = {name: numbers.normal(size=KEYS) for name in names}
            writer.load({entity: np.arange(KEYS), **columns}, entity)


async def measured(url: str, folder: Path, seconds: float, rounds: int) -> Mapping[str, list[Latencies]]:
    """Measure every side once a round, every other round backwards."""
    async with contextlib.AsyncExitStack() as stack:
        sides = {
            "bare HMGET": await stack.enter_async_context(bare(url)),
            "read": await stack.enter_async_context(reading(url)),
            "predict": await stack.enter_async_context(predicting(url, folder)),
        }
        found: dict[str, list[Latencies]] = {name: [] for name in sides}
        for i in range(rounds):
            for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
                found[name].append(await load(sides[name], seconds))
        return found


async def load(ask: Any, seconds: float) -> Latencies:
    """Send requests at their times, whether the ones before are answered or not."""
    rng = random.Random(7)
    values: list[float] = []
    degraded = 0

    async def one(due: float, user: int) -> None:
        nonlocal degraded
        degraded += bool(await ask(user))
        values.append((perf_counter() - due) * 1000)

    running = set()
    began = perf_counter()
    for i in range(int(seconds * RATE)):
        due = began + i / RATE
        if (early := due - perf_counter()) > 0:
            await asyncio.sleep(early)
        task = asyncio.create_task(one(due, rng.randrange(KEYS)))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return Latencies(values, degraded)


@contextlib.asynccontextmanager
async def bare(url: str) -> AsyncIterator[Any]:
    """What the driver does without us."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=64, protocol=2)
    client = redis.asyncio.Redis.from_pool(pool)

    async def ask(user: int) -> None:
        pipeline = client.pipeline(transaction=False)
        for entity, names in NAMES.items():
            pipeline.hmget(f"modelserve:features:{entity}:{user}", names)
        await pipeline.execute()

    await asyncio.gather(*(ask(0) for _ in range(READS_AT_ONCE)))
    yield ask
    await client.aclose()


@contextlib.asynccontextmanager
async def reading(url: str) -> AsyncIterator[Any]:
    """The step of the request path: keys in, a row that the model takes out."""
    plan = FeaturePlan("m", Signature.infer(example()), declared(1000.0))
    store = plugins.features(url)
    feature_reader = FeatureReader(store, "redis", Observers(), own=True)
    await feature_reader.start()
    loop = asyncio.get_running_loop()

    async def ask(user: int) -> Any:
        request = plan.validate({"user_id": user, "item_id": user, "x": 0.5})
        return (await feature_reader.enrich(plan, [request], "", loop.time() + 10))[1]

    yield ask
    await feature_reader.close()


@contextlib.asynccontextmanager
async def predicting(url: str, folder: Path) -> AsyncIterator[Any]:
    """The whole way of a request, with the budget that it has by default."""
    x = example()
    registry = open_registry(folder)
    model = LinearRegression().fit(np.column_stack(list(x.values())), x["x"])
    registry.register("m", "1", model, example={name: column[:4] for name, column in x.items()})
    registry.promote("m", "1")
    options = {"m": ms.ModelOptions(features=declared(BUDGET_MS))}
    async with ms.AsyncModelServer(registry, options, cache_dir=folder / "cache", features=url) as server:

        async def ask(user: int) -> Any:
            return (await server.predict("m", {"user_id": user, "item_id": user, "x": 0.5})).degraded

        yield ask


def example() -> dict[str, Any]:
    """Return rows of everything that the model takes."""
    numbers = np.random.default_rng(20)
    return {name: numbers.normal(size=100) for name in ["x", *NAMES["user_id"], *NAMES["item_id"]]}


def declared(budget_ms: float) -> tuple[ms.Features, ...]:
    return tuple(
        ms.Features(entity, names, defaults=dict.fromkeys(names, 0.0), max_age_s=3600, budget_ms=budget_ms)
        for entity, names in NAMES.items()
    )


if __name__ == "__main__":
    main()
