"""The reconciler against a registry and a loader of plain Python, in virtual time: every fault can be ordered."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable, ModelNotFound, NotReady, SchemaOutdated, VersionNotFound
from modelserve.events import LoadRejected, VersionLoaded, VersionUnloaded
from modelserve.resilience.executor import DaemonExecutor
from modelserve.serving.inference import PredictRequest
from modelserve.serving.snapshots import Snapshots
from modelserve.types import DeploymentState
from tests.serving.world import YEAR, FakeRegistry, FakeVersion, World, run, version


def test_start_returns_when_everything_wanted_is_loaded() -> None:
    """After start the production version serves."""

    async def scenario(world: World) -> None:
        await world.start(1)
        assert world.serving == "1"
        assert world.reconciler.status()[0].ready

    run(scenario)


def test_a_hint_is_acted_upon_at_once() -> None:
    """A hint makes the reconciler look without waiting for the poll."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.promote(2)
        await asyncio.sleep(0.2)
        assert world.serving == "2"

    run(scenario)


def test_polling_alone_is_enough() -> None:
    """A change whose hint is lost is found within the poll interval."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.promote(2)
        await asyncio.sleep(1.2)
        assert world.serving == "2"

    run(scenario)


def test_a_hint_from_another_process_is_acted_upon_at_once() -> None:
    """What other processes tell wakes the reconciler as a change in its own does, and no more after it stopped."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.promote(2)
        world.elsewhere.publish("m")
        await asyncio.sleep(0.2)
        assert world.serving == "2"

    world = run(scenario, poll_s=1e6)
    assert len(world.elsewhere) == 0
    assert world.registry.listeners == []


def test_after_a_reconnect_everything_is_looked_at() -> None:
    """A hint for no model in particular finds the change whose own hint was lost, also of a model that is new."""

    async def scenario(world: World) -> None:
        await world.reconciler.start()
        for number in (1, 2):
            world.registry.promote(number)
            await world.hint(None)
            await asyncio.sleep(0.2)
            assert world.serving == str(number)

    run(scenario, poll_s=1e6)


@pytest.mark.parametrize("turns", range(4))
def test_stopping_ends_whatever_hint_it_meets(turns: int) -> None:
    """A hint that arrives in the very moment of a stop does not keep the poll alive."""

    async def scenario(world: World) -> None:
        await world.reconciler.start()
        await asyncio.sleep(0.1)
        world.reconciler._nudge(None)
        for _ in range(turns):
            await asyncio.sleep(0)

    run(scenario)  # which stops it then


@pytest.mark.promise("P4")
def test_a_flood_of_hints_costs_one_look_at_a_time() -> None:
    """Thousands of hints in a row, for this model, for all and for unknown ones, cost two reads and no keeper."""

    async def scenario(world: World) -> None:
        await world.start(1)
        before = world.registry.reads
        for i in range(5_000):
            world.registry.hint("m")
            world.registry.hint(None)
            world.registry.hint(f"unknown-{i}")
        await asyncio.sleep(0.5)
        assert world.registry.reads - before <= 2
        assert len(world.reconciler._reconcilers) == 1

    run(scenario)


@pytest.mark.promise("P4")
def test_hints_out_of_order_late_and_for_other_models_change_nothing() -> None:
    """Hints only make it look: whatever they name and whenever they come, what serves is what the registry wants."""

    async def scenario(world: World) -> None:
        await world.start(1)
        for number in (2, 3):
            world.registry.promote(number)
        for model_name in ("other", "m", None, "m", "other", ""):
            await world.hint(model_name)
        await asyncio.sleep(0.3)
        assert world.serving == "3"
        served = [event for event in world.events if isinstance(event, VersionLoaded)]
        await world.hint("m")
        await asyncio.sleep(0.3)
        assert [event for event in world.events if isinstance(event, VersionLoaded)] == served
        assert world.loader.started == [1, 3]

    run(scenario, poll_s=1e6)


def test_repeated_hints_load_once() -> None:
    """Any number of hints for one change starts one load."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.promote(2)
        for _ in range(20):
            await world.hint()
        await asyncio.sleep(1)
        assert world.loader.started == [1, 2]

    run(scenario)


def test_the_old_version_serves_while_the_new_one_loads() -> None:
    """Between a promotion and the end of its load the version before keeps answering."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.loader.seconds[2] = 30
        await world.promote(2)
        await asyncio.sleep(29)
        assert world.serving == "1"
        assert world.reconciler.status()[0].loading == "2"
        await asyncio.sleep(2)
        assert world.serving == "2"

    run(scenario)


def test_a_version_that_fails_leaves_the_old_one_serving_and_is_retried_with_back_off() -> None:
    """A refused version changes nothing, raises an event, and is tried again after 1, 2, 4 … seconds."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.loader.failing.add(2)
        await world.promote(2)
        await asyncio.sleep(14)
        assert world.serving == "1"
        assert world.reconciler.status()[0].ready
        assert "refused" in str(world.reconciler.status()[0].problem)
        refusals = [event for event in world.events if isinstance(event, LoadRejected)]
        assert [event.retry_s for event in refusals] == [1, 2, 4, 8]
        world.loader.failing.clear()
        await asyncio.sleep(16)
        assert world.serving == "2"
        assert world.reconciler.status()[0].problem is None

    run(scenario)


def test_a_newer_wish_overtakes_a_hanging_load() -> None:
    """A load that never ends does not keep a later promotion from being served."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.loader.seconds[2] = 1e6
        await world.promote(2)
        await world.promote(3)
        await asyncio.sleep(0.5)
        assert world.serving == "3"
        assert world.loader.cancelled == [2]

    run(scenario)


def test_a_load_that_a_rollback_made_pointless_is_given_up() -> None:
    """Back to what serves already, nothing goes on loading, and nobody hears of it later."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.loader.seconds[2] = 1e6
        await world.promote(2)
        assert world.status.loading == "2"
        await world.promote(1)
        assert world.loader.cancelled == [2]
        assert world.serving == "1"
        assert world.status.loading is None
        assert world.status.problem is None

    run(scenario)


def test_a_version_of_another_model_is_not_served() -> None:
    """A row that points elsewhere changes nothing but what is told; put right, it is followed."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.promote(2)
        assert world.registry.state is not None
        right = world.registry.state
        wrong = dataclasses.replace(version(2), model_name="other")
        for state in (dataclasses.replace(right, production=wrong), dataclasses.replace(right, previous=wrong)):
            world.registry.state = state
            await world.hint()
            assert world.serving == "1"
            assert "version 2 of 'other'" in str(world.status.problem)
        world.registry.state = right
        await world.hint()
        await asyncio.sleep(0.5)
        assert world.serving == "2"
        assert world.status.problem is None

    run(scenario)


def test_an_unrelated_change_does_not_restart_a_load() -> None:
    """A new generation that wants the same version leaves its running load alone."""

    async def scenario(world: World) -> None:
        world.loader.seconds[1] = 5
        world.registry.promote(1)
        starting = asyncio.create_task(world.reconciler.start())
        await asyncio.sleep(1)
        world.registry.touch()
        await world.hint()
        await starting
        assert world.loader.started == [1]
        assert world.reconciler["m"].generation == 2

    run(scenario)


def test_the_previous_version_stays_warm_for_a_rollback() -> None:
    """Going back to the version before needs no load."""

    async def scenario(world: World) -> None:
        for number in (1, 2, 1):
            world.registry.promote(number)
            await (world.hint() if world.registry.listeners else world.reconciler.start())
            await asyncio.sleep(0.5)
        assert world.serving == "1"
        assert world.loader.started == [1, 2]

    run(scenario)


def test_without_keep_previous_the_old_version_is_freed() -> None:
    """``keep_previous=False`` unloads the version before after the swap."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.promote(2)
        await asyncio.sleep(0.5)
        assert world.loader.alive == [2]
        assert VersionUnloaded("m", "1") in world.events

    run(scenario, models={"m": ModelOptions(keep_previous=False)})


def test_what_is_neither_production_nor_previous_is_freed() -> None:
    """After three promotions the first version is gone, and the second can still be asked for by name."""

    async def scenario(world: World) -> None:
        await world.start(1)
        for number in (2, 3):
            await world.promote(number)
            await asyncio.sleep(0.5)
        assert world.loader.alive == [2, 3]
        assert world.reconciler["m"].choose(PredictRequest("m", (), version="2"))[0].meta.version == "2"
        with pytest.raises(VersionNotFound):
            world.reconciler["m"].choose(PredictRequest("m", (), version="1"))

    run(scenario)


def test_a_registry_that_is_down_changes_nothing_that_serves() -> None:
    """While the database is down the loaded version serves; afterwards the missed change is caught up."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.down = True
        await world.promote(2)
        await asyncio.sleep(30)
        assert world.serving == "1"
        assert world.reconciler.problem is not None
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.serving == "2"
        assert world.reconciler.problem is None

    run(scenario)


def test_a_registry_that_fails_unforeseen_does_not_end_the_polling(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever reading the registry raises, the next poll reads it again."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.bug = RuntimeError("unforeseen")
        world.registry.promote(2)
        await asyncio.sleep(5)
        assert world.serving == "1"
        assert "RuntimeError" in str(world.reconciler.problem)
        world.registry.bug = None
        await asyncio.sleep(1.5)
        assert world.serving == "2"

    run(scenario)


def test_a_start_without_registry_comes_up_not_ready_and_heals() -> None:
    """A host that starts while the database is down is told why there is no model, and gets it later."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.down = True
        await world.reconciler.start()
        with pytest.raises(NotReady, match="it is down"):
            world.reconciler["m"]
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.serving == "1"

    run(scenario, models={"m": ModelOptions()})


def test_a_load_that_ends_while_the_registry_is_down_is_taken_in_afterwards() -> None:
    """The state is read again after a load; if that fails, later polls make up for it."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.promote(2)
        world.registry.down = True
        await asyncio.sleep(0.5)
        assert world.loader.alive == [1, 2]
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.serving == "2"

    run(scenario)


def test_what_is_served_is_stale_while_the_registry_cannot_be_read(tmp_path: Path) -> None:
    """The status says since when, and stops saying so when the registry answers; readiness is not touched."""

    async def scenario(world: World) -> None:
        await world.start(1)
        assert world.status.stale is None
        await asyncio.sleep(0.5)
        world.registry.down = True
        await asyncio.sleep(5)
        assert world.status.ready
        assert world.status.stale is not None
        assert 0.9 < (world.status.stale - YEAR).total_seconds() < 1.5
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.status.stale is None

    run(scenario)


def test_a_hint_says_that_the_registry_is_back(tmp_path: Path) -> None:
    """Whoever tells of a change could make one: what is served is confirmed at once, not at the next poll."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.down = True
        await asyncio.sleep(1.5)
        assert world.status.stale is not None
        world.registry.down = False
        world.registry.hint()
        await asyncio.sleep(0.01)
        assert world.status.stale is None

    run(scenario)


def kept(folder: Path, number: int, generation: int, saved: dt.datetime = YEAR, **changes: Any) -> Snapshots:
    """Return snapshots with one in it, as an earlier process left it."""
    made = dataclasses.replace(version(number), **changes)
    state = DeploymentState(model_name="m", generation=generation, production=made, previous=None)
    Snapshots(folder, "url", now=lambda: saved).save(state)
    return Snapshots(folder, "url", now=World.time)


@pytest.mark.promise("P4")
@pytest.mark.parametrize("models", [None, {"m": ModelOptions()}])
def test_a_start_without_registry_serves_what_was_applied_last(
    tmp_path: Path, models: dict[str, ModelOptions] | None
) -> None:
    """A snapshot stands in, said to be stale since it was written; the registry takes over when it is back."""
    saved = YEAR - dt.timedelta(hours=1)

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.promote(2)
        world.registry.down = True
        await world.reconciler.start()
        assert world.serving == "1"
        assert world.status.stale == saved
        assert (world.status.ready, world.status.wanted, world.status.applied) == (True, 1, 1)
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.serving == "2"
        assert world.status.stale is None
        assert world.reconciler["m"].generation == 2

    run(scenario, models=models, snapshots=kept(tmp_path, 1, 1, saved))


def test_a_snapshot_that_is_still_true_is_not_loaded_again(tmp_path: Path) -> None:
    """When the registry is back and wants what stands in already, only the mark goes away."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.down = True
        await world.reconciler.start()
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.status.stale is None
        assert world.loader.started == [1]

    run(scenario, snapshots=kept(tmp_path, 1, 1))


def test_a_readable_registry_is_believed_and_no_snapshot(tmp_path: Path) -> None:
    """A snapshot of a higher generation means nothing to a server that can ask, and is replaced."""
    snapshots = kept(tmp_path, 9, 50, YEAR - dt.timedelta(days=1))

    async def scenario(world: World) -> None:
        await world.start(1)
        assert world.loader.started == [1]
        await asyncio.sleep(0)

    run(scenario, snapshots=snapshots)
    assert snapshots.load()["m"].state.generation == 1


def test_models_that_are_not_asked_for_are_not_served_from_snapshots(tmp_path: Path) -> None:
    """An explicit list bounds a start without the registry too, and a model without a snapshot waits."""

    async def scenario(world: World) -> None:
        world.registry.down = True
        await world.reconciler.start()
        with pytest.raises(ModelNotFound):
            world.reconciler["m"]
        with pytest.raises(NotReady, match="it is down"):
            world.reconciler["other"]
        assert world.loader.started == []

    run(scenario, models={"other": ModelOptions()}, snapshots=kept(tmp_path, 1, 1))


def test_a_snapshot_that_does_not_load_is_retried_until_the_registry_is_back(tmp_path: Path) -> None:
    """What is missing in the cache keeps the model waiting with a reason, and nothing else."""

    async def scenario(world: World) -> None:
        world.registry.promote(2)
        world.registry.down = True
        world.loader.failing.add(1)
        await world.reconciler.start()
        with pytest.raises(NotReady, match="does not load"):
            world.reconciler["m"]
        await asyncio.sleep(4)
        assert world.loader.started == [1, 1, 1]
        assert world.status.stale is None
        world.registry.down = False
        await asyncio.sleep(1.5)
        assert world.serving == "2"

    run(scenario, snapshots=kept(tmp_path, 1, 1, artifact=version(1).artifact))


def test_a_registry_that_refuses_is_not_stood_in_for(tmp_path: Path) -> None:
    """Tables of another release are for somebody to mend: a start does not hide that behind a snapshot."""

    async def scenario(world: World) -> None:
        world.registry.bug = SchemaOutdated("1", "2")
        await world.reconciler.start()
        with pytest.raises(NotReady, match="modelserve db upgrade"):
            world.reconciler["m"]
        assert world.loader.started == []

    run(scenario, snapshots=kept(tmp_path, 1, 1))


@pytest.mark.promise("P4")
def test_a_registry_that_lags_is_ignored_and_one_that_has_gone_back_is_followed(tmp_path: Path) -> None:
    """A lower generation counts when it has been read for a minute, also against a snapshot; then it is kept."""
    snapshots = kept(tmp_path, 1, 50, YEAR, created_at=YEAR - dt.timedelta(days=9))

    async def scenario(world: World) -> None:
        world.registry.down = True
        await world.reconciler.start()
        world.registry.promote(1)  # of the same id and name, in a database that is new
        fresh = world.registry.state
        world.registry.down = False
        await asyncio.sleep(50)
        assert world.reconciler["m"].generation == 50
        assert "gone back from generation 50 to 1" in str(world.status.problem)
        world.registry.state = dataclasses.replace(fresh, generation=50)  # type: ignore[type-var]
        await asyncio.sleep(2)
        assert world.reconciler["m"].production.meta.created_at == YEAR
        world.registry.state = fresh
        await asyncio.sleep(50)
        assert world.reconciler["m"].generation == 50
        await asyncio.sleep(15)
        assert world.reconciler["m"].generation == 1
        assert world.status.problem is None
        assert world.loader.started == [1, 1]

    run(scenario, snapshots=snapshots)
    assert snapshots.load()["m"].state.generation == 1


def test_another_registry_with_the_same_generation_is_found_within_a_minute() -> None:
    """A database that was filled anew can have the old numbers by chance; what they stand for is compared."""

    async def scenario(world: World) -> None:
        await world.start(1)
        assert world.registry.state is not None
        other = dataclasses.replace(version(1), created_at=YEAR + dt.timedelta(days=1))
        world.registry.state = dataclasses.replace(world.registry.state, production=other)
        await asyncio.sleep(62)
        assert world.reconciler["m"].production.meta == other
        assert world.loader.alive == [1]

    run(scenario)


def test_a_registry_that_knows_no_such_model_any_more_takes_nothing_away() -> None:
    """A database that was emptied leaves its models serving, and a version of its own replaces them."""

    async def scenario(world: World) -> None:
        for number in (1, 2, 3):
            await world.start(number)
        world.registry.state = None
        await asyncio.sleep(200)
        assert world.serving == "3"
        assert world.status.ready
        world.registry.promote(4)
        await asyncio.sleep(65)
        assert world.serving == "4"

    run(scenario)


def test_a_snapshot_that_could_not_be_kept_is_kept_later(tmp_path: Path) -> None:
    """Serving goes on while the cache folder cannot be written, and what is applied is noted when it can."""
    snapshots = Snapshots(tmp_path, "url", now=World.time)

    async def scenario(world: World) -> None:
        (tmp_path / "applied").write_text("in the way")
        await world.start(1)
        assert world.serving == "1"
        (tmp_path / "applied").unlink()
        await asyncio.sleep(62)
        assert snapshots.load()["m"].state == world.registry.state

    run(scenario, snapshots=snapshots)


def test_in_place_of_another_the_previous_version_is_not_kept() -> None:
    """``reload="replace"`` is for where there is no room for two: the one before is freed after the swap."""

    async def scenario(world: World) -> None:
        await world.start(1)
        await world.promote(2)
        await asyncio.sleep(0.5)
        assert world.loader.alive == [2]
        assert world.loader.beside == [None, "1"]

    run(scenario, models={"m": ModelOptions(reload="replace", keep_previous=True)})


def test_before_the_first_look_no_model_is_called_unknown() -> None:
    """Serving whatever is in production, a server that could not yet ask what that is says so, and not "not found"."""

    async def scenario(world: World) -> None:
        world.registry.down = True
        await world.reconciler.start()
        with pytest.raises(NotReady, match=r"not known yet: .* is down"):
            world.reconciler["m"]
        world.registry.down = False
        world.registry.promote(1)
        await asyncio.sleep(1.5)
        assert world.serving == "1"
        with pytest.raises(ModelNotFound):
            world.reconciler["other"]

    run(scenario)


def test_models_that_are_not_configured_are_not_served() -> None:
    """With an explicit list, other models of the registry are unknown here."""

    async def scenario(world: World) -> None:
        await world.start(1)
        with pytest.raises(ModelNotFound):
            world.reconciler["m"]
        with pytest.raises(NotReady, match="no such model"):
            world.reconciler["other"]

    run(scenario, models={"other": ModelOptions()})


def test_events_tell_each_takeover_once(caplog: pytest.LogCaptureFixture) -> None:
    """One ``VersionLoaded`` per takeover, with the generation that wanted it, and a line in the log."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.touch()
        await world.hint()
        await world.promote(2)
        await asyncio.sleep(1)

    with caplog.at_level(logging.INFO, "modelserve"):
        told = [event for event in run(scenario).events if isinstance(event, VersionLoaded)]
    assert told == [VersionLoaded("m", "1", 1), VersionLoaded("m", "2", 3)]
    assert "loaded m 2, it serves from now on (production, generation 3)" in caplog.text


# -- reads that fail, and a database that is far away ------------------------------------------------------


def state_of(name: str, number: int | None, generation: int = 1) -> DeploymentState:
    """Make what is wanted of a model; a version of it in production unless ``number`` is None."""
    production = None if number is None else dataclasses.replace(version(number), model_name=name)
    return DeploymentState(model_name=name, generation=generation, production=production, previous=None)


def foreign(registry: FakeRegistry) -> None:
    state = registry.state
    assert state is not None
    wrong = dataclasses.replace(version(1), model_name="other")
    registry.state = dataclasses.replace(state, production=wrong, generation=9)


TROUBLES: dict[str, Callable[[FakeRegistry], object]] = {
    "is down": lambda registry: setattr(registry, "down", True),
    "fails unforeseen": lambda registry: setattr(registry, "bug", RuntimeError("unforeseen")),
    "is emptied": lambda registry: setattr(registry, "state", None),
    "goes back": lambda registry: setattr(registry, "state", state_of("m", 1, generation=0)),
    "points elsewhere": foreign,
}


@pytest.mark.promise("P4")
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("models", [None, {"m": ModelOptions()}])
def test_start_returns_whatever_becomes_of_the_registry_while_a_model_loads(
    trouble: str, models: dict[str, ModelOptions] | None
) -> None:
    """A load that ends is taken in, though nothing can be read at that moment."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.loader.seconds[1] = 5
        starting = asyncio.create_task(world.reconciler.start())
        await asyncio.sleep(0.5)
        TROUBLES[trouble](world.registry)
        async with asyncio.timeout(30):
            await starting
        assert world.serving == "1"
        assert world.status.ready

    run(scenario, models=models)


@pytest.mark.promise("P4")
def test_a_change_during_the_start_is_followed() -> None:
    """The poll begins with the start, so that a load of minutes does not keep a newer wish from being seen."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.loader.seconds[1] = 1e6
        starting = asyncio.create_task(world.reconciler.start())
        await asyncio.sleep(0.5)
        world.registry.promote(2)
        async with asyncio.timeout(5):
            await starting
        assert world.serving == "2"

    run(scenario)


def test_a_load_that_its_own_model_cancels_is_refused_and_tried_again() -> None:
    """A model's code that raises ``CancelledError`` costs its version a back-off, not the loop its turns."""

    async def scenario(world: World) -> None:
        async def load(*args: Any, **options: Any) -> FakeVersion:
            world.loader.started.append(1)
            raise asyncio.CancelledError

        world.loader.load = load  # type: ignore[method-assign]
        await world.start(1)
        assert "cancelled" in str(world.status.problem)
        await asyncio.sleep(2)
        assert world.loader.started == [1, 1]

    run(scenario)


class Far(DaemonExecutor):
    """Answers one question after the other, each after four round trips of 20 ms in virtual time."""

    def __init__(self) -> None:
        super().__init__(1, "far")
        self.asked: list[str] = []
        self._free_at = 0.0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        loop = asyncio.get_running_loop()
        self._free_at = max(self._free_at, loop.time()) + 0.08

        def answer() -> None:
            self.ended += 1
            if future.set_running_or_notify_cancel():
                self.asked.append("question")
                try:
                    future.set_result(fn(*args, **kwargs))
                except Exception as error:
                    future.set_exception(error)

        loop.call_at(self._free_at, answer)
        return future


@pytest.mark.promise("P4")
@pytest.mark.parametrize("listed", [True, False])
def test_320_models_behind_a_far_database_take_one_question(listed: bool) -> None:  # noqa: FBT001  # a parameter
    """However many there are, what is wanted of all of them is one question, at the start and at each resync."""
    names = [f"m{i}" for i in range(320)]

    async def scenario(world: World) -> None:
        world.registry.others = {name: state_of(name, 1) for name in names}
        await world.reconciler.start()
        assert len(world.sql.asked) == 1
        assert asyncio.get_running_loop().time() < 1
        assert sum(status.ready for status in world.reconciler.status()) == 320
        await asyncio.sleep(59)
        polls, reads = len(world.sql.asked), world.registry.reads
        assert polls < 62
        assert reads == 1
        await asyncio.sleep(2)
        assert world.registry.reads == 2

    run(scenario, models={name: ModelOptions() for name in names} if listed else None, sql=Far())


def test_of_20000_names_only_those_in_production_are_kept() -> None:
    """One question reads them all; a name without a version in production costs no keeper and is not called unknown."""

    async def scenario(world: World) -> None:
        world.registry.others = {f"m{i}": state_of(f"m{i}", 1 if i < 3 else None) for i in range(20_000)}
        await world.reconciler.start()
        assert [status.model_name for status in world.reconciler.status()] == ["m0", "m1", "m2"]
        assert all(status.ready for status in world.reconciler.status())
        assert len(world.reconciler._reconcilers) == 3
        with pytest.raises(NotReady, match="no version of it is in production"):
            world.reconciler["m7"]
        with pytest.raises(ModelNotFound):
            world.reconciler["m20000"]
        world.registry.others["m7"] = state_of("m7", 1, 2)
        await asyncio.sleep(1.5)
        assert world.reconciler["m7"].generation == 2
        assert world.registry.reads == 2

    run(scenario)


@pytest.mark.promise("P4")
def test_a_model_whose_first_read_fails_is_in_the_status_and_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    """A model that is known to be in production counts from then on, whether or not what it takes could be read."""

    async def scenario(world: World) -> None:
        await world.start(1)
        world.registry.others["new"] = state_of("new", 2)
        world.registry.unreadable = {"m", "new"}  # where they stand can be read, and no more
        world.registry.error = BackendUnavailable("registry database", "it went away")
        await asyncio.sleep(1.5)
        old, new = world.reconciler.status()
        assert (old.ready, new.ready, new.model_name) == (True, False, "new")
        assert "went away" in str(new.problem)
        assert "went away" in caplog.text
        with pytest.raises(NotReady, match="went away"):
            world.reconciler["new"]
        world.registry.unreadable.clear()
        await asyncio.sleep(1.5)
        assert [status.ready for status in world.reconciler.status()] == [True, True]

    run(scenario)


@pytest.mark.parametrize("models", [None, {"m": ModelOptions(), "odd": ModelOptions()}])
def test_rows_that_cannot_be_read_do_not_hide_the_other_models(models: dict[str, ModelOptions] | None) -> None:
    """One model's rows may be such that reading them fails: it alone is not ready, and says so."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.others = {name: state_of(name, 1) for name in ("odd", "one", "two")}
        world.registry.unreadable, world.registry.error = {"odd"}, ValueError("no JSON")
        await world.reconciler.start()
        ready = {status.model_name: status.ready for status in world.reconciler.status()}
        assert ready == {name: name != "odd" for name in (models or ("m", "odd", "one", "two"))}
        world.registry.promote(2)
        await asyncio.sleep(61)
        assert world.serving == "2"
        odd = next(status for status in world.reconciler.status() if status.model_name == "odd")
        assert "cannot be read" in str(odd.problem)
        world.registry.unreadable.clear()
        await asyncio.sleep(1.5)
        assert world.reconciler["odd"].production.meta.version == "1"

    run(scenario, models=models)


def test_a_model_that_leaves_production_before_it_served_does_not_count() -> None:
    """What is known to be no longer wanted does not keep the server from being ready, unlike what is unknown."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.others["gone"] = state_of("gone", 2)
        world.loader.failing.add(2)
        await world.reconciler.start()
        assert [status.ready for status in world.reconciler.status()] == [False, True]
        world.registry.others["gone"] = state_of("gone", None, 2)
        await asyncio.sleep(1.5)
        assert [(status.model_name, status.ready) for status in world.reconciler.status()] == [("m", True)]

    run(scenario)


def test_hints_for_one_model_do_not_put_off_the_poll() -> None:
    """A model that changes all the time does not keep the change of another, whose hint was lost, from being found."""

    async def scenario(world: World) -> None:
        world.registry.promote(1)
        world.registry.others["other"] = state_of("other", 1)
        await world.reconciler.start()
        world.registry.others["other"] = state_of("other", 2, 2)
        for _ in range(15):
            world.registry.touch()
            world.registry.hint("m")
            await asyncio.sleep(0.1)
        assert world.reconciler["other"].generation == 2

    run(scenario)


def test_stopping_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    """What was applied cannot be noted then; the server closes all the same."""

    class Stuck(DaemonExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            return Future()

    async def scenario(world: World) -> None:
        await world.start(1)
        assert world.serving == "1"

    run(scenario, snapshots=Snapshots(tmp_path, "url"), disk=Stuck(1, "stuck"))


def do(world: World, action: str, number: int) -> None:
    """Let something happen to the registry or to the loader."""
    registry, loader = world.registry, world.loader
    happenings: dict[str, Callable[[], object]] = {
        "promote": lambda: registry.promote(number),
        "hint all": lambda: world.registry.hint(None),
        "hint another": lambda: world.elsewhere.publish(f"m{number}"),
        "hint": registry.hint,
        "touch": registry.touch,
        "down": lambda: setattr(registry, "down", True),
        "up": lambda: setattr(registry, "down", False),
        "break": lambda: loader.failing.add(number),
        "heal": loader.failing.clear,
        "slow": lambda: loader.seconds.__setitem__(number, 3.0),
        "fast": lambda: loader.seconds.__setitem__(number, 0.0),
    }
    happenings[action]()


async def watch(world: World) -> None:
    """Look twenty times a second whether what serves may serve."""
    last = 0
    while True:
        with contextlib.suppress(ModelNotFound, NotReady):
            now = world.reconciler["m"]
            assert now.generation >= last
            last = now.generation
            assert now.production.meta.id in world.registry.was_wanted
            assert not now.production.unloaded  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)


ACTIONS = ["promote", "hint", "hint all", "hint another", "touch", "down", "up", "break", "heal", "slow", "fast"]


@pytest.mark.promise("P4")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 4), st.integers(0, 40)), max_size=30))
def test_whatever_happens_it_converges_and_never_goes_back(steps: list[tuple[str, int, int]]) -> None:
    """Under any order of promotions, hints, outages, slow and failing loads, it ends as wanted.

    Meanwhile applied generations only rise, and what serves was wanted once and is still loaded.
    """

    async def scenario(world: World) -> None:
        await world.start(1)
        watcher = asyncio.create_task(watch(world))
        for action, number, tenths in steps:
            do(world, action, number)
            await asyncio.sleep(tenths / 10)
        do(world, "up", 0)
        do(world, "heal", 0)
        await asyncio.sleep(70)  # the poll, the longest back-off and the slowest load
        watcher.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watcher
        wanted = world.registry.deployments()["m"]
        assert wanted.production is not None
        assert world.reconciler["m"].generation == wanted.generation
        assert world.reconciler["m"].production.meta.id == wanted.production.id

    run(scenario)
