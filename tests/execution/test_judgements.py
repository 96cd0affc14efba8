"""The small judges of the engine: circuit, quarantine, what runs in place, and how many threads a worker gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.batching import quarantine
from modelserve.batching.quarantine import Care, Quarantine
from modelserve.errors import InferenceFailed
from modelserve.execution import cores
from modelserve.execution.in_place import HAND_OVER_S, InPlace
from modelserve.execution.restarts import RestartPolicy


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_circuit_lets_a_worker_die_once_in_a_while() -> None:
    """Deaths that are far apart are each followed by a start at once."""
    circuit = RestartPolicy()
    assert [circuit.died(at) for at in (0, 100, 200, 300, 400, 500)] == [0.0] * 6
    assert not circuit.open


def test_the_circuit_opens_on_the_fifth_death_in_a_minute_and_closes_when_all_is_well() -> None:
    """Pauses grow, then starts become rare; half a minute of life closes it, and a death begins that anew."""
    circuit = RestartPolicy()
    assert [circuit.died(at) for at in range(5)] == [0.0, 0.5, 1.0, 2.0, 30.0]
    assert circuit.open
    assert not circuit.lives(40)
    assert circuit.died(60) == 30.0
    assert not circuit.lives(100)
    assert not circuit.lives(129)
    assert circuit.lives(130)
    assert not circuit.open
    assert circuit.died(131) == 0.0


def failure(text: str = "the model raised ValueError: unknown category") -> InferenceFailed:
    return InferenceFailed(text)


def test_the_quarantine_convicts_only_what_died_alone_as_a_suspect() -> None:
    """In company every row is a suspect, and what runs is cleared; a suspect that dies alone is refused for a while."""
    clock = Clock()
    kept: Quarantine[str] = Quarantine(hash, clock)
    assert not kept
    assert kept.accuse(["a", "b", "c"]) is None
    assert kept.judge(["d", "c"]) == {1: Care.DEADLY}
    kept.clear("a")
    assert kept.judge(["a"]) == {}
    assert kept.accuse(["a"]) is None  # alone, but not a suspect any more
    verdict = kept.accuse(["b"])
    assert isinstance(verdict, InferenceFailed)
    assert "twice" in str(verdict)
    assert kept.judge(["x", "b"]) == {1: verdict}
    assert kept.refused == 1
    clock.now = 601.0
    assert kept.refused == 0
    assert kept.judge(["b"]) == {0: Care.DEADLY}  # another try
    assert isinstance(kept.accuse(["b"]), InferenceFailed)


def test_the_quarantine_refuses_what_failed_twice_with_the_same_error_and_for_longer_each_time() -> None:
    """One failure alone is a suspicion; two are a refusal for a minute, then for two, up to ten, with a try between."""
    clock = Clock()
    kept: Quarantine[str] = Quarantine(hash, clock)
    kept.failed("a", failure(), twice=False)
    assert kept.judge(["a", "b"]) == {0: Care.ALONE}
    refused_s = 60.0
    for expected in (60.0, 120.0, 240.0, 480.0, 600.0, 600.0):
        refused_s = expected
        error = failure(f"for {refused_s}")
        kept.failed("a", error, twice=False)
        clock.now += refused_s - 0.1
        assert kept.judge(["a"]) == {0: error}
        clock.now += 0.2
        assert kept.judge(["a"]) == {0: Care.ALONE}
    kept.clear("a")
    assert not kept


def test_the_quarantine_forgets_what_failed_some_time_ago_and_all_of_it_when_the_model_is_at_fault() -> None:
    """Failures are forgotten a while after they were of use, or at once when forgiven; deaths are not."""
    clock = Clock()
    kept: Quarantine[str] = Quarantine(hash, clock)
    kept.failed("once", failure(), twice=False)
    kept.failed("twice", failure(), twice=True)
    clock.now = 61.0
    assert kept.judge(["once", "twice"]) == {1: Care.ALONE}
    clock.now = 200.0
    assert kept.judge(["twice"]) == {}
    assert not kept
    kept.failed("once", failure(), twice=False)
    kept.failed("twice", failure(), twice=True)
    kept.accuse(["killer"])
    kept.forgive()
    assert kept.judge(["once", "twice", "killer"]) == {2: Care.DEADLY}


def test_the_quarantine_remembers_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever new inputs that kill or fail cannot fill the memory."""
    monkeypatch.setattr(quarantine, "_MOST", 10)
    kept: Quarantine[int] = Quarantine(hash, Clock())
    kept.accuse(list(range(100)))
    assert len(kept.judge(range(100))) == 10
    for i in range(200, 300):
        kept.failed(i, failure(), twice=True)
    assert len(kept.judge(range(200, 300))) == 10


def learned(seconds: float, clock: Clock) -> InPlace:
    judge = InPlace(clock)
    for _ in range(5):
        for rows in (1, 2, 4, 8):
            judge.ran_elsewhere(rows, seconds + rows * 1e-7)
    return judge


def test_in_place_runs_what_costs_less_than_the_way_to_the_thread() -> None:
    """Below the price of a hand-over yes, above it never, and never far more rows than were seen."""
    assert not InPlace(Clock()).allows(1)
    assert learned(20e-6, Clock()).allows(8)
    assert not learned(20e-6, Clock()).allows(17)
    assert not learned(HAND_OVER_S, Clock()).allows(1)


def test_in_place_one_batch_of_one_size_is_not_enough() -> None:
    """What one size costs says nothing of the next."""
    judge = InPlace(Clock())
    for _ in range(100):
        judge.ran_elsewhere(1, 1e-6)
    assert not judge.allows(1)


def test_in_place_is_barred_after_a_batch_over_the_cap_for_longer_each_time() -> None:
    """A batch that held up the loop bars the next ones for a second, then two; many good ones earn a pardon."""
    clock = Clock()
    judge = learned(20e-6, clock)
    for bar in (1.0, 2.0, 4.0):
        judge.ran(1, 0.5)
        assert not judge.allows(1)
        clock.now += bar - 0.01
        assert not judge.allows(1)
        clock.now += 0.02
        for _ in range(50):
            judge.ran(1, 20e-6)
        assert judge.allows(1)
    assert judge.over_cap == 3
    for _ in range(3000):
        judge.ran(1, 20e-6)
    judge.ran(1, 0.5)
    clock.now += 1.01
    for _ in range(50):
        judge.ran(1, 20e-6)
    assert judge.allows(1)


@given(st.integers(1, 64), st.integers(1, 128), st.sampled_from([None, "1", "3", "nonsense", "", "-2", "4,2"]))
def test_replicas_times_threads_stay_within_the_cores(replicas: int, have: int, limit: str | None) -> None:
    """Each worker gets its share of the cores and at least one; a lower limit of the host's stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "cores", lambda: have)
        environment = {} if limit is None else {"OMP_NUM_THREADS": limit}
        threads = int(cores.thread_limits(cores.share_of(replicas), environment)["OMP_NUM_THREADS"])
    assert threads >= 1
    assert threads == 1 or threads * replicas <= have
    if limit in {"1", "3"}:
        assert threads <= int(limit)


def test_there_is_a_core() -> None:
    """Whatever limits this process, it has at least one core."""
    assert cores.cores() >= 1
