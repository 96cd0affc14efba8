"""Several wanted versions of one model: each is loaded by itself, and the more important never pays for the others."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelserve as ms
from modelserve import wiring
from modelserve.artifacts import DiskCache
from modelserve.config import ModelOptions
from modelserve.events import LoadRejected, VersionLoaded
from modelserve.serving.reconciler import Reconciler
from modelserve.serving.wanted import Wanted, wanted_of
from modelserve.testing.models import tells, telltale
from modelserve.types import DeploymentState, Role
from tests.serving.world import World, run, version

# -- each by itself, in virtual time -----------------------------------------------------------------------


def test_every_role_is_loaded_and_in_the_status() -> None:
    """The status names the versions in the order of their importance; observers learn of each role."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.assign(("canary", 2), ("shadow", 3), ("shadow", 4))
        await asyncio.sleep(0.2)
        assert world.roles == {"production": ["1"], "canary": ["2"], "shadow": ["3", "4"]}
        assert [(each.role, each.version, each.loaded) for each in world.status.roles] == [
            ("production", "1", True),
            ("canary", "2", True),
            ("shadow", "3", True),
            ("shadow", "4", True),
        ]

    loaded = [event for event in run(scenario).events if isinstance(event, VersionLoaded)]
    assert [(event.role, event.version) for event in loaded] == [
        ("production", "1"),
        ("canary", "2"),
        ("shadow", "3"),
        ("shadow", "4"),
    ]


@pytest.mark.promise("P4")
@pytest.mark.parametrize("trouble", ["hangs", "fails"])
@pytest.mark.parametrize("role", ["canary", "shadow"])
def test_a_start_and_a_promotion_do_not_wait_for_a_lesser_version(role: Role, trouble: str) -> None:
    """Production is ready without it, takes over without it, and its own status says nothing of it."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.assign((role, 9))
        if trouble == "hangs":
            world.loader.seconds[9] = 1e6
        else:
            world.loader.failing.add(9)
        async with asyncio.timeout(1):
            await world.reconciler.start()
        assert (world.serving, world.status.ready, world.status.problem) == ("1", True, None)
        await world.promote(2)
        await asyncio.sleep(0.2)
        assert (world.serving, world.status.ready, world.status.problem) == ("2", True, None)
        assert world.status.loading is None
        assert world.problem_of(9) == (None if trouble == "hangs" else "it does not load")

    run(scenario)


@pytest.mark.promise("P4")
@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_lesser_versions_do_not_wait_for_production(trouble: str) -> None:
    """While the next version for production does not load, a canary is loaded, and another is taken away."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.assign(("canary", 2))
        await asyncio.sleep(0.2)
        if trouble == "hangs":
            world.loader.seconds[3] = 1e6
        else:
            world.loader.failing.add(3)
        await world.promote(3)
        await world.assign(("canary", 4), ("shadow", 5))
        assert world.roles == {"production": ["1"]}  # a canary that is not wanted any more gets nothing from now on
        await asyncio.sleep(0.2)
        assert world.roles == {"production": ["1"], "canary": ["4"], "shadow": ["5"]}
        assert world.reconciler["m"].generation == 2  # of what is in production
        assert world.loader.alive == [1, 4, 5]

    run(scenario)


def test_each_version_has_its_own_back_off() -> None:
    """A version that is refused for the first time is tried again after a second, whatever others have failed."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.loader.failing |= {2, 3, 4}
        await world.assign(("canary", 2))
        await asyncio.sleep(10)
        await world.assign(("canary", 2), ("shadow", 3))
        await asyncio.sleep(2)
        await world.promote(4)
        await asyncio.sleep(4)

    refused = [event for event in run(scenario).events if isinstance(event, LoadRejected)]
    pauses = {each: [event.retry_s for event in refused if event.version == each] for each in ("2", "3", "4")}
    assert pauses == {"2": [1, 2, 4, 8, 16], "3": [1, 2, 4], "4": [1, 2, 4]}
    assert {(event.version, event.role) for event in refused} == {("2", "canary"), ("3", "shadow"), ("4", "production")}


def test_a_canary_that_is_promoted_takes_over_without_a_load() -> None:
    """It is loaded and proven already; the version that it was beside stays as the previous one."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.assign(("canary", 2))
        await asyncio.sleep(0.2)
        world.registry.promote(2)
        await world.assign()
        assert world.roles == {"production": ["2"]}
        assert world.loader.started == [1, 2]
        assert world.loader.alive == [1, 2]

    run(scenario)


def test_a_load_whose_version_is_promoted_meanwhile_begins_again_for_production() -> None:
    """As a shadow's it would wait in a shadow's queue, and could be refused the memory that production gets."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.loader.seconds[2] = 5
        await world.assign(("shadow", 2))
        world.loader.seconds[2] = 0.1
        await world.promote(2)
        await asyncio.sleep(0.2)
        assert world.serving == "2"
        assert world.loader.roles == [("production", 1), ("shadow", 2), ("production", 2)]
        assert world.loader.cancelled == [2]

    run(scenario)


def test_in_place_of_another_a_demoted_version_is_loaded_again() -> None:
    """It has lent its successor a replica until it is freed: kept as a shadow, it would keep production small."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.promote(2)
        await world.assign(("shadow", 1))
        await asyncio.sleep(0.15)
        assert world.roles == {"production": ["2"]}
        assert world.loader.alive == [2]
        await asyncio.sleep(0.2)
        assert world.roles == {"production": ["2"], "shadow": ["1"]}

    run(scenario, models={"m": ModelOptions(reload="replace")})


def test_a_canary_of_another_model_is_refused_alone() -> None:
    """A row that points elsewhere costs its own role only."""

    def foreign(state: DeploymentState) -> list[Wanted]:
        return [*wanted_of(state), Wanted("canary", version(2, "other")), Wanted("shadow", version(3))]

    async def scenario(world: World) -> None:
        await world.start(1)
        await asyncio.sleep(0.2)
        assert world.roles == {"production": ["1"], "shadow": ["3"]}
        assert "version 2 of 'other'" in str(world.problem_of(2))
        assert world.status.problem is None

    run(scenario, wanted_of=foreign)


def test_a_registry_that_was_emptied_takes_no_role_away() -> None:
    """What serves goes on, the canary and the shadows with it."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.assign(("canary", 2), ("shadow", 3))
        await asyncio.sleep(0.2)
        world.registry.state = None
        await asyncio.sleep(200)
        assert world.roles == {"production": ["1"], "canary": ["2"], "shadow": ["3"]}

    run(scenario)


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.promise("P4")
def test_a_shadow_is_refused_first_and_says_why() -> None:
    """At a start with too little memory for all, the least important waits, and is loaded when there is room."""

    async def scenario(world: World) -> None:
        world.loader.memory, world.loader.sizes = 25, {1: 10, 2: 10, 3: 10}
        world.registry.promote(1)
        world.registry.assign(("canary", 2), ("shadow", 3))
        await world.reconciler.start()
        await asyncio.sleep(5)
        assert world.roles == {"production": ["1"], "canary": ["2"]}
        assert "would be needed" in str(world.problem_of(3))
        assert world.status.ready
        world.loader.memory = 30
        await asyncio.sleep(10)
        assert world.roles == {"production": ["1"], "canary": ["2"], "shadow": ["3"]}
        assert world.problem_of(3) is None

    run(scenario)


@pytest.mark.promise("P4")
def test_memory_for_production_is_taken_from_shadows_then_from_the_canary() -> None:
    """What matters less is freed, one version at a time and no more of them than needed."""

    async def scenario(world: World) -> None:
        world.loader.memory, world.loader.sizes = 40, {1: 10, 2: 10, 3: 10, 4: 10, 5: 20}
        await world.start(1)
        await world.assign(("canary", 2), ("shadow", 3), ("shadow", 4))
        await asyncio.sleep(0.2)
        await world.promote(5)
        await asyncio.sleep(0.3)
        assert world.roles == {"production": ["5"], "canary": ["2"]}
        assert "version 5 (production) needs its memory" in str(world.problem_of(3))
        assert world.loader.taken == 40

    run(scenario, models={"m": ModelOptions()})


def test_a_shadow_that_is_being_loaded_gives_its_memory_to_production() -> None:
    """What its load will take does not show yet, and is counted all the same."""

    async def scenario(world: World) -> None:
        world.loader.memory, world.loader.sizes = 30, {1: 10, 2: 15, 3: 15}
        await world.start(1)
        world.loader.seconds[2] = 5
        await world.assign(("shadow", 2))
        await world.promote(3)
        await asyncio.sleep(0.3)
        assert world.serving == "3"
        assert world.loader.cancelled == [2]

    run(scenario)


def test_the_version_kept_for_a_rollback_is_not_freed_for_another() -> None:
    """Wanted as a shadow too, it stays the previous version: a promotion does not cost the rollback."""

    async def scenario(world: World) -> None:
        world.loader.memory, world.loader.sizes = 25, {1: 10, 2: 10, 3: 10}
        await world.start(1)
        await world.promote(2)
        await asyncio.sleep(0.2)
        await world.assign(("shadow", 1))
        await world.promote(3)
        await asyncio.sleep(5)
        assert world.serving == "2"
        assert world.loader.alive == [1, 2]
        assert "refused" in str(world.status.problem)

    run(scenario)


SIZES = st.fixed_dictionaries({number: st.integers(1, 20) for number in range(1, 7)})


@pytest.mark.promise("P4")
@settings(max_examples=200)
@given(
    SIZES, st.integers(0, 90), st.lists(st.permutations(range(1, 7)), min_size=1, max_size=4), st.sampled_from([0, 5])
)
def test_no_version_lacks_memory_that_a_less_important_one_has(
    sizes: dict[int, int], memory: int, wishes: list[list[int]], seconds: int
) -> None:
    """Whatever is wanted in a row, the versions refused at the end do not fit beside those that matter more."""

    async def scenario(world: World) -> None:
        world.loader.sizes, world.loader.memory = sizes, memory
        world.registry.promote(wishes[0][0])
        await world.reconciler.start()
        for production, canary, *shadows in wishes:
            world.registry.promote(production)
            await world.assign(("canary", canary), *(("shadow", each) for each in shadows[:2]))
            await asyncio.sleep(seconds)
        await asyncio.sleep(200)
        serving = int(world.serving)
        assert world.loader.taken <= max(memory, sizes[serving])
        order = [int(each.version) for each in world.status.roles]
        for place, number in enumerate(order):
            if number not in world.loader.alive:
                assert sum(sizes[each] for each in {serving, *order[: place + 1]}) > memory

    run(scenario, models={"m": ModelOptions(keep_previous=False)})


ACTIONS = ["promote", "canary", "shadow", "none", "break", "heal", "slow", "fast", "touch", "down", "up"]


def act(world: World, action: str, number: int) -> None:
    """Let something happen to what is wanted, or to the loader."""
    happenings: dict[str, Callable[[], object]] = {
        "promote": lambda: world.registry.promote(number),
        "canary": lambda: world.registry.assign(("canary", number), ("shadow", number % 5 + 1)),
        "shadow": lambda: world.registry.assign(("shadow", number), ("shadow", number % 5 + 1)),
        "none": world.registry.assign,
        "break": lambda: world.loader.failing.add(number),
        "heal": world.loader.failing.clear,
        "slow": lambda: world.loader.seconds.__setitem__(number, 3.0),
        "fast": lambda: world.loader.seconds.__setitem__(number, 0.0),
        "touch": world.registry.touch,
        "down": lambda: setattr(world.registry, "down", True),
        "up": lambda: setattr(world.registry, "down", False),
    }
    happenings[action]()
    world.registry.hint()


async def watch(world: World) -> None:
    """Look twenty times a second whether what has a role is loaded."""
    while True:
        with contextlib.suppress(ms.NotReady):
            for each in world.reconciler["m"].versions:
                assert not each.unloaded  # type: ignore[attr-defined]  # only the double of a version has it
        await asyncio.sleep(0.05)


@pytest.mark.promise("P4")
@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 5), st.integers(0, 40)), max_size=25))
def test_whatever_happens_every_role_converges(steps: list[tuple[str, int, int]]) -> None:
    """At the end each role has what is wanted, nothing else is loaded, and no version with a role was ever freed."""

    async def scenario(world: World) -> None:
        await world.start(1)
        watcher = asyncio.create_task(watch(world))
        for action, number, tenths in steps:
            act(world, action, number)
            await asyncio.sleep(tenths / 10)
        act(world, "up", 0)
        act(world, "heal", 0)
        await asyncio.sleep(70)  # the poll, the longest back-off and the slowest load
        watcher.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watcher
        state = world.registry.state
        assert state is not None
        wanted = [(each.role, each.version.version) for each in world.registry.wanted_of(state)]
        once = list({number: (role, number) for role, number in reversed(wanted)}.values())
        assert sorted((role, each.meta.version) for role, each in world.reconciler["m"].roles) == sorted(once)
        previous = world.reconciler["m"].previous
        kept = {int(number) for _, number in once} | ({previous.meta.id} if previous else set())
        assert set(world.loader.alive) == kept

    run(scenario)


# -- real loads --------------------------------------------------------------------------------------------

X = np.array([[1.0], [2.0]])


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with versions of the model ``m``, the first in production."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    for number in range(1, 9):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")
    return registry


@pytest.fixture
def others(registry: ms.Registry, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Role, str]]:
    """The versions that servers want beside production, which a test may set before they start."""
    found: list[tuple[Role, str]] = []

    def source(state: DeploymentState) -> list[Wanted]:
        return [*wanted_of(state), *(Wanted(role, registry.get("m", each)) for role, each in found)]

    monkeypatch.setattr(wiring, "Reconciler", partial(Reconciler, wanted_of=source))
    return found


@pytest.fixture
def held_back(registry: ms.Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The versions whose artifacts do not arrive until the test is over."""
    names: set[str] = set()
    over = threading.Event()
    fetch = DiskCache.fetch

    def slow(self: DiskCache, store: Any, artifact: Any, given_up: Any) -> Any:
        if any(registry.get("m", name).artifact == artifact for name in names):
            while not (over.wait(0.01) or given_up.is_set()):
                pass
        return fetch(self, store, artifact, given_up)

    monkeypatch.setattr(DiskCache, "fetch", slow)
    yield names
    over.set()


async def until(condition: Callable[[], bool], server: ms.AsyncModelServer) -> None:
    """Wait for the next events of a server until the condition holds."""
    changed = asyncio.Event()
    stop = server.observe(lambda _: changed.set())
    async with asyncio.timeout(30):
        while not condition():
            changed.clear()
            await changed.wait()
    stop()


def loaded(server: ms.AsyncModelServer) -> list[str]:
    return [each.version for each in server.status()[0].roles if each.loaded]


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_each_role_answers_as_its_own_version(
    registry: ms.Registry, others: list[tuple[Role, str]], tmp_path: Path, executor: str
) -> None:
    """Real versions in all roles: production answers, and each of the others when a request names it."""
    others += [("canary", "2"), ("shadow", "3")]
    models = {"m": ms.ModelOptions.model_validate({"executor": executor})}
    async with ms.AsyncModelServer(registry, models, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        await until(lambda: loaded(server) == ["1", "2", "3"], server)
        for pinned, number in ((None, 1), ("1", 1), ("2", 2), ("3", 3)):
            answer = await server.predict("m", {"x": [5.0]}, version=pinned, key="user-7")
            assert tells(answer.prediction, 5) == number
            assert answer.model_version == str(number)


@pytest.mark.promise("P4")
async def test_production_does_not_queue_behind_the_downloads_of_others(
    registry: ms.Registry, others: list[tuple[Role, str]], held_back: set[str], tmp_path: Path
) -> None:
    """More shadows than there are threads wait for their artifacts; production and a canary load meanwhile."""
    shadows = ("4", "5", "6", "7", "8")
    others += [("canary", "3"), *(("shadow", each) for each in shadows)]
    held_back |= set(shadows)
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        await until(lambda: loaded(server) == ["1", "3"], server)
        registry.promote("m", "2")
        await until(lambda: server.status()[0].production == "2", server)
        assert tells((await server.predict("m", {"x": [5.0]})).prediction, 5) == 2
        assert loaded(server) == ["2", "3"]
        assert [each.loading for each in server.status()[0].roles] == [False, False, *[True] * len(shadows)]
