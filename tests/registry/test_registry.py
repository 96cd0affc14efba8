"""What the registry promises, over SQLite and PostgreSQL alike."""

from __future__ import annotations

import dataclasses
import datetime as dt
import getpass
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeAlias

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelserve.database import clock
from modelserve.database.tables import deployment, model_version
from modelserve.errors import (
    InvalidInput,
    InvalidTransition,
    ModelNotFound,
    ModelServeError,
    VersionExists,
    VersionNotFound,
)
from modelserve.registry import Registry
from modelserve.types import Artifact, DeploymentEvent, ModelVersion, Pointer

Insert: TypeAlias = Callable[..., ModelVersion]


def in_brief(registry: Registry, model_name: str = "churn") -> tuple[int, str | None, str | None]:
    """Return generation, production and previous."""
    state = registry.deployment(model_name)
    production, previous = (each.version if each else None for each in (state.production, state.previous))
    return state.generation, production, previous


def statuses(registry: Registry, model_name: str = "churn") -> dict[str, str]:
    """Return each version's status."""
    return {each.version: each.status for each in registry.versions(model_name)}


@pytest.fixture
def abc(registry: Registry, insert: Insert) -> Registry:
    """A registry with versions A, B and C of ``churn`` in staging, at generation 3."""
    for version in "ABC":
        insert(registry, "churn", version)
    return registry


# -- registering -------------------------------------------------------------------------------------------


def test_a_version_comes_back_as_it_was_registered(registry: Registry, insert: Insert) -> None:
    """Every value survives the database, and a new version is in staging."""
    given: dict[str, Any] = {
        "framework": "onnx",
        "artifact": Artifact(key="k/€", sha256="0f" * 32, size=5_000_000_000, format="onnx"),
        "example": Artifact(key="e", sha256="f0" * 32, size=17, format="example-json"),
        "signature": {"inputs": [{"name": "x", "shape": [None, 3]}]},
        "load_options": {"method": "predict_proba", "trusted": ["a.B"]},
        "metrics": {"auc": 0.93, "confusion": [[1, 2], [3, 4]], "note": None},
        "tags": {"équipe": "données 🐢"},
    }
    stored = insert(registry, "churn", "1.4.2", **given)
    assert stored == registry.get("churn", "1.4.2")
    assert (stored.model_name, stored.version, stored.status) == ("churn", "1.4.2", "staging")
    assert {name: getattr(stored, name) for name in given} == given


def test_registering_makes_the_model_known(registry: Registry, insert: Insert) -> None:
    """The first version makes the model; no version of it is in production yet."""
    insert(registry, "churn", "1")
    assert registry.models() == ["churn"]
    assert in_brief(registry) == (1, None, None)
    assert [event.action for event in registry.history("churn")] == ["register"]


def test_a_version_is_registered_once(abc: Registry, insert: Insert) -> None:
    """A second row of that name is refused and leaves no trace."""
    with pytest.raises(VersionExists):
        insert(abc, "churn", "A")
    assert in_brief(abc) == (3, None, None)
    assert (abc._exists("churn", "A"), abc._exists("churn", "Z"), abc._exists("fraud", "A")) == (True, False, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", {"auc": float("nan")}),
        ("metrics", {"curve": {1, 2}}),
        ("signature", object()),
        ("tags", {("a", "b"): "c"}),
        ("actor", "a\0"),
        ("reason", "\ud800"),
    ],
)
def test_what_the_database_could_not_keep_is_refused(
    registry: Registry, insert: Insert, field: str, value: object
) -> None:
    """The field is named, and nothing is registered."""
    with pytest.raises(InvalidInput) as caught:
        insert(registry, "churn", "1", **{field: value})
    assert caught.value.field == field
    assert registry.models() == []


def test_names_are_checked(registry: Registry, insert: Insert) -> None:
    """A row cannot get a name that the faces could not serve."""
    with pytest.raises(InvalidInput, match="model_name"):
        insert(registry, "batch", "1")
    with pytest.raises(InvalidInput, match="version"):
        insert(registry, "churn", "1/2")


def test_numpy_numbers_are_metrics(registry: Registry, insert: Insert) -> None:
    """A score straight from numpy is kept as the number it is."""
    stored = insert(registry, "churn", "1", metrics={"auc": np.float32(0.5), "rows": np.int64(7)})
    assert stored.metrics == {"auc": 0.5, "rows": 7}


# -- promoting ---------------------------------------------------------------------------------------------


def test_promoting_archives_the_one_before(abc: Registry) -> None:
    """Production moves, the one before becomes previous, the generation rises by one each time."""
    assert abc.promote("churn", "A").status == "production"
    assert in_brief(abc) == (4, "A", None)
    promoted = abc.promote("churn", "B")
    assert promoted == abc.production("churn") == abc.get("churn", "B")
    assert in_brief(abc) == (5, "B", "A")
    assert statuses(abc) == {"A": "archived", "B": "production", "C": "staging"}


def test_promoting_what_is_in_production_changes_nothing(abc: Registry) -> None:
    """No generation, no event, no hint."""
    abc.promote("churn", "A")
    heard: list[str | None] = []
    abc.subscribe(heard.append)
    assert abc.promote("churn", "A").version == "A"
    assert in_brief(abc) == (4, "A", None)
    assert len(abc.history("churn")) == 4
    assert heard == []


def test_an_archived_version_can_be_promoted_again(abc: Registry) -> None:
    """Archived is not gone."""
    for version in "ABA":
        abc.promote("churn", version)
    assert in_brief(abc) == (6, "A", "B")
    assert statuses(abc) == {"A": "production", "B": "archived", "C": "staging"}


def test_models_do_not_touch_each_other(abc: Registry, insert: Insert) -> None:
    """Production, generation and history are per model."""
    insert(abc, "fraud", "A")
    abc.promote("churn", "A")
    abc.promote("fraud", "A")
    abc.promote("churn", "B")
    assert in_brief(abc, "fraud") == (2, "A", None)
    assert abc.generations() == {"churn": 5, "fraud": 2}
    assert abc.models() == ["churn", "fraud"]


# -- rolling back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "among", [["churn", "fraud"], ["churn", "fraud", "a\x00b"], ["churn", "fraud", *map(str, range(1001))], None]
)
def test_what_is_wanted_of_many_is_read_at_once(abc: Registry, insert: Insert, among: list[str] | None) -> None:
    """Of all models, or of those named, however many; unknown and impossible names are left out."""
    insert(abc, "fraud", "1")
    abc.promote("churn", "A")
    abc.promote("churn", "B")
    found = abc.deployments(among)
    assert found == {name: abc.deployment(name) for name in ("churn", "fraud")}
    churn, fraud = found["churn"], found["fraud"]
    assert (churn.production and churn.production.version, churn.previous and churn.previous.version) == ("B", "A")
    assert (fraud.production, fraud.previous, fraud.generation) == (None, None, 1)
    assert churn.production is not None
    assert abc.pointers(among) == {
        "churn": Pointer(churn.generation, churn.production.id),
        "fraud": Pointer(1, None),
    }
    assert abc.deployments(["fraud"]).keys() == abc.pointers(["fraud"]).keys() == {"fraud"}
    assert not abc.deployments([])
    assert not abc.pointers([])


def test_rollbacks_lead_back_to_the_first_promoted_version(abc: Registry) -> None:
    """A, B, C: back to B with A before it, back to A, and no further."""
    for version in "ABC":
        abc.promote("churn", version)
    assert abc.rollback("churn").version == "B"
    assert in_brief(abc) == (7, "B", "A")
    assert statuses(abc) == {"A": "archived", "B": "production", "C": "archived"}
    assert abc.rollback("churn") == abc.production("churn")
    assert in_brief(abc) == (8, "A", None)
    with pytest.raises(InvalidTransition, match="no earlier version to go back to"):
        abc.rollback("churn")
    assert in_brief(abc) == (8, "A", None)


def test_a_rollback_passes_over_what_was_rolled_back(abc: Registry) -> None:
    """After A, B, back, C the way leads from C to A."""
    abc.promote("churn", "A")
    abc.promote("churn", "B")
    abc.rollback("churn")
    abc.promote("churn", "C")
    assert in_brief(abc)[1:] == ("C", "A")
    assert abc.rollback("churn").version == "A"


def test_nothing_to_roll_back_to_before_any_promotion(abc: Registry) -> None:
    """A model that never was in production cannot go back."""
    with pytest.raises(InvalidTransition):
        abc.rollback("churn")


# -- archiving ---------------------------------------------------------------------------------------------


def test_staging_can_be_archived_once(abc: Registry) -> None:
    """The first time is a change with its event; the second changes nothing."""
    assert abc.archive("churn", "A").status == "archived"
    assert abc.archive("churn", "A") == abc.get("churn", "A")
    assert in_brief(abc) == (4, None, None)
    assert (abc.history("churn")[-1].action, abc.history("churn")[-1].version) == ("archive", "A")


def test_production_cannot_be_archived(abc: Registry) -> None:
    """The error says what to do instead."""
    abc.promote("churn", "A")
    with pytest.raises(InvalidTransition, match="promote another version or roll back") as caught:
        abc.archive("churn", "A")
    assert caught.value.version == "A"
    assert in_brief(abc) == (4, "A", None)


# -- reading -----------------------------------------------------------------------------------------------


def test_versions_come_newest_first(abc: Registry) -> None:
    """In the order of registration, whatever they are called."""
    assert [each.version for each in abc.versions("churn")] == ["C", "B", "A"]


def test_an_empty_registry_has_nothing(registry: Registry) -> None:
    """An empty database is a registry without models."""
    assert (registry.models(), registry.generations()) == ([], {})


@pytest.mark.parametrize("name", ["fraud", "", "no such/model", "a\0b", "\ud800", "x" * 10_000])
def test_unknown_models_are_named(abc: Registry, name: str) -> None:
    """Any text a client may send for a name is just an unknown model."""
    calls: list[Callable[[], object]] = [
        lambda: abc.get(name, "A"),
        lambda: abc.versions(name),
        lambda: abc.production(name),
        lambda: abc.history(name),
        lambda: abc.deployment(name),
        lambda: abc.promote(name, "A"),
        lambda: abc.rollback(name),
        lambda: abc.archive(name, "A"),
    ]
    for call in calls:
        with pytest.raises(ModelNotFound) as caught:
            call()
        assert caught.value.model_name == name


@pytest.mark.parametrize("version", ["Z", "", "a\0b", "../A"])
def test_unknown_versions_are_named(abc: Registry, version: str) -> None:
    """So is any text for a version of a model that exists."""
    for call in (abc.get, abc.promote, abc.archive):
        with pytest.raises(VersionNotFound) as caught:
            call("churn", version)
        assert (caught.value.model_name, caught.value.version) == ("churn", version)


def test_no_production_is_told_apart_from_no_model(abc: Registry) -> None:
    """A model without a production version is found, but has none."""
    with pytest.raises(VersionNotFound) as caught:
        abc.production("churn")
    assert caught.value.version is None


def test_moments_come_out_in_utc(registry_url: str, insert: Insert) -> None:
    """A clock in any zone is understood; both databases answer aware and in UTC."""
    moment = dt.datetime(2026, 10, 1, 1, 30, 0, 123456, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    with Registry(registry_url, now=lambda: moment) as registry:
        insert(registry, "churn", "1")
        found = [registry.get("churn", "1").created_at, registry.history("churn")[0].occurred_at]
    assert found == [moment, moment]
    assert [each.tzinfo for each in found] == [dt.UTC, dt.UTC]


def test_history_tells_who_did_what_and_why(abc: Registry) -> None:
    """Each event holds what was live after it."""
    abc.promote("churn", "A", actor="ci", reason="first")
    abc.promote("churn", "B", actor="ana@desk", reason="better\nand faster")
    abc.rollback("churn", actor="bot", reason="p99")
    fields = ("generation", "action", "version", "production", "previous", "actor", "reason")
    told = [tuple(dataclasses.asdict(event)[field] for field in fields) for event in abc.history("churn")]
    assert told[2:] == [
        (3, "register", "C", None, None, "tester", ""),
        (4, "promote", "A", "A", None, "ci", "first"),
        (5, "promote", "B", "B", "A", "ana@desk", "better\nand faster"),
        (6, "rollback", "A", "A", None, "bot", "p99"),
    ]


def test_the_actor_is_user_and_host_by_default(abc: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without a name does not stop a change."""
    monkeypatch.setattr(getpass, "getuser", lambda: "ana")
    monkeypatch.setattr(socket, "gethostname", lambda: "desk")
    abc.promote("churn", "A")

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nameless)
    abc.promote("churn", "B")
    assert [event.actor for event in abc.history("churn")[-2:]] == ["ana@desk", "unknown@desk"]


# -- hints -------------------------------------------------------------------------------------------------


def test_hints_follow_the_commit(abc: Registry) -> None:
    """A listener that looks at once, through a connection of its own, sees the change it was told of."""
    seen: list[tuple[int, str | None, str | None]] = []
    end = abc.subscribe(lambda _: seen.append(in_brief(abc)))
    abc.promote("churn", "A")
    abc.promote("churn", "B")
    abc.rollback("churn")
    abc.archive("churn", "C")
    end()
    abc.promote("churn", "C")
    assert seen == [(4, "A", None), (5, "B", "A"), (6, "A", None), (7, "A", None)]


def test_a_refused_change_gives_no_hint(abc: Registry, insert: Insert) -> None:
    """Nothing changed, so nobody is told."""
    heard: list[str | None] = []
    abc.subscribe(heard.append)
    calls: list[Callable[[], object]] = [
        lambda: abc.rollback("churn"),
        lambda: insert(abc, "churn", "A"),
        lambda: abc.promote("churn", "Z"),
    ]
    for refused in calls:
        with pytest.raises(ModelServeError):
            refused()
    assert heard == []


# -- many at once ------------------------------------------------------------------------------------------


class Watcher:
    """Looks at production again and again, each time in a transaction of its own; remembers what was wrong."""

    LOOK = sa.select(
        sa.func.count(model_version.c.id),
        sa.func.max(model_version.c.id),
        sa.select(deployment.c.production_id).where(deployment.c.model_name == "churn").scalar_subquery(),
    ).where((model_version.c.model_name == "churn") & (model_version.c.status == "production"))

    def __init__(self, engine: sa.Engine) -> None:
        self.looks = 0
        self.wrong: list[tuple[Any, ...]] = []
        self._engine = engine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.is_set():
            with self._engine.connect() as connection:
                count, production_id, pointer = connection.execute(self.LOOK).one()
            self.looks += 1
            if count != 1 or production_id != pointer:
                self.wrong.append((count, production_id, pointer))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def watcher(registry: Registry, bare_engine: sa.Engine, insert: Insert) -> Iterator[Watcher]:
    """Five versions of ``churn``, the first in production, under watch."""
    for version in range(5):
        insert(registry, "churn", str(version))
    registry.promote("churn", "0")
    with Watcher(bare_engine) as watcher:
        yield watcher


def check_chain(events: list[DeploymentEvent]) -> None:
    """Generations have neither gap nor double, and each promotion starts from what the one before left."""
    assert [event.generation for event in events] == list(range(1, len(events) + 1))
    for before, after in itertools.pairwise(events):
        if after.action == "promote":
            assert (after.production, after.previous) == (after.version, before.production)
            assert after.production != before.production


def test_fifty_concurrent_promotes_leave_one_production_at_every_commit(registry: Registry, watcher: Watcher) -> None:
    """Fifty threads promote at the same moment; whoever looks in between sees exactly one production version."""
    barrier = threading.Barrier(50)

    def promote(number: int) -> ModelVersion:
        barrier.wait()
        return registry.promote("churn", str(number % 5))

    with ThreadPoolExecutor(50) as threads:
        promoted = list(threads.map(promote, range(50)))
    assert [each.version for each in promoted] == [str(number % 5) for number in range(50)]
    assert {each.status for each in promoted} == {"production"}
    assert (watcher.looks > 0, watcher.wrong) == (True, [])
    check_chain(registry.history("churn"))
    assert in_brief(registry)[0] == len(registry.history("churn"))


def test_promotes_from_several_processes_leave_one_production_at_every_commit(
    registry: Registry, watcher: Watcher, run_workers: Callable[..., list[str]]
) -> None:
    """The lock is the database's: it holds between processes, too."""
    assert run_workers("promote", 4) == ["done"] * 4
    assert (watcher.looks > 0, watcher.wrong) == (True, [])
    check_chain(registry.history("churn"))
    assert in_brief(registry)[0] == len(registry.history("churn"))


def test_one_of_many_registrations_of_a_version_wins(registry: Registry, insert: Insert) -> None:
    """Sixteen threads register the same first version of a model; fifteen are told that it exists."""
    barrier = threading.Barrier(16)

    def register(_: int) -> str:
        barrier.wait()
        try:
            return insert(registry, "churn", "1").status
        except VersionExists:
            return "exists"

    with ThreadPoolExecutor(16) as threads:
        assert sorted(threads.map(register, range(16))) == ["exists"] * 15 + ["staging"]
    assert in_brief(registry) == (1, None, None)


# -- any sequence at all -----------------------------------------------------------------------------------

VERSIONS = st.sampled_from(["1", "2", "3", "4"])


class RegistryMachine(RuleBasedStateMachine):
    """Any sequence of calls leaves the registry as a dictionary and a stack would be."""

    insert: Insert

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry("sqlite://")
        self.statuses: dict[str, str] = {}
        self.stack: list[str] = []
        self.generation = 0

    def teardown(self) -> None:
        self.registry.close()

    @rule(version=VERSIONS)
    def register(self, version: str) -> None:
        if version in self.statuses:
            with pytest.raises(VersionExists):
                self.insert(self.registry, "churn", version)
            return
        self.insert(self.registry, "churn", version)
        self.statuses[version] = "staging"
        self.generation += 1

    @rule(version=VERSIONS)
    def promote(self, version: str) -> None:
        if version not in self.statuses:
            with pytest.raises(VersionNotFound if self.statuses else ModelNotFound):
                self.registry.promote("churn", version)
            return
        assert self.registry.promote("churn", version).version == version
        if self.stack[-1:] != [version]:
            self.statuses |= dict.fromkeys(self.stack[-1:], "archived") | {version: "production"}
            self.stack.append(version)
            self.generation += 1

    @precondition(lambda self: self.statuses)
    @rule()
    def rollback(self) -> None:
        if len(self.stack) < 2:
            with pytest.raises(InvalidTransition):
                self.registry.rollback("churn")
            return
        self.statuses[self.stack.pop()] = "archived"
        self.statuses[self.stack[-1]] = "production"
        assert self.registry.rollback("churn").version == self.stack[-1]
        self.generation += 1

    @precondition(lambda self: self.statuses)
    @rule(version=VERSIONS)
    def archive(self, version: str) -> None:
        status = self.statuses.get(version)
        if status in {None, "production"}:
            with pytest.raises(InvalidTransition if status else VersionNotFound):
                self.registry.archive("churn", version)
            return
        assert self.registry.archive("churn", version).status == "archived"
        self.generation += status == "staging"
        self.statuses[version] = "archived"

    @invariant()
    def agrees(self) -> None:
        if not self.statuses:
            assert self.registry.models() == []
            return
        production, previous = ([None, None, *self.stack][-1], [None, None, *self.stack][-2])
        assert statuses(self.registry) == self.statuses
        assert in_brief(self.registry) == (self.generation, production, previous)
        history = self.registry.history("churn")
        assert [event.generation for event in history] == list(range(1, self.generation + 1))
        assert (history[-1].production, history[-1].previous) == (production, previous)


def test_any_sequence_of_calls_agrees_with_the_model(insert: Insert) -> None:
    """Whatever is called in whatever order, states, pointers, generation and events stay consistent."""
    RegistryMachine.insert = staticmethod(insert)
    RegistryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
    RegistryMachine.TestCase("runTest").runTest()


def test_times_are_those_of_the_database(registry: Registry, insert: Insert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes whose clocks differ by days write times that compare: versions and events follow one clock."""

    def off(_: sa.Connection) -> dt.datetime:
        return dt.datetime(2031, 1, 1, tzinfo=dt.UTC)

    monkeypatch.setattr(clock, "now", off)
    assert insert(registry, "churn", "1").created_at == dt.datetime(2031, 1, 1, tzinfo=dt.UTC)
    assert registry.history("churn")[0].occurred_at == dt.datetime(2031, 1, 1, tzinfo=dt.UTC)
