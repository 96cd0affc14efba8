"""Memory before a shared cache: whose copy lives how long."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.caching.envelope import sealed
from modelserve.caching.memory import MemoryCache
from modelserve.caching.shared import Shared
from modelserve.caching.tiers import LOCAL_S, Tiers, split
from tests.caching.doubles import FaultyCache, Turns


@given(st.floats(0.001, 1e6))
def test_no_answer_gets_older_than_its_time(ttl_s: float) -> None:
    """What a process copied at the last moment is gone when its time is: the two parts add up to it."""
    shared_s, local_s = split(ttl_s)
    assert shared_s + local_s == pytest.approx(ttl_s)
    assert 0.0 < local_s <= min(LOCAL_S, shared_s * 1.0001)


async def test_what_one_process_computed_another_one_has() -> None:
    """A value put here is found there, once in the shared cache and from then on in the memory there."""
    far = FaultyCache(budget_s=1.0)
    here, there = (Tiers(MemoryCache(), Shared(far)) for _ in range(2))
    here.put([("m:a", b"0.5")], 60.0)
    assert here.get("m:a") == b"0.5"
    await Turns.until(lambda: len(far))
    assert there.get("m:a") is None
    (kept,) = await there.fetch(["m:a"], 60.0)
    assert kept is not None
    assert kept.value == 0.5
    assert there.get("m:a") == b"0.5"
    await asyncio.gather(here.close(), there.close())


async def test_a_value_under_the_wrong_key_is_a_miss_and_not_copied() -> None:
    """What says another key than the one it lies under is nobody's answer."""
    far = FaultyCache(budget_s=1.0)
    far.put("m:a", sealed("m:b", b"0.5"), 60.0)
    tiers = Tiers(MemoryCache(), Shared(far))
    assert list(await tiers.fetch(["m:a"], 60.0)) == [None]
    assert tiers.get("m:a") is None
    await tiers.close()


@pytest.mark.parametrize(("chance", "shared_s"), [(0.0, 50.0), (1.0, 45.0)])
async def test_times_are_spread(chance: float, shared_s: float) -> None:
    """What was put at one moment ends within a tenth of its time, earlier and never later."""
    far = FaultyCache(budget_s=1.0)
    tiers = Tiers(MemoryCache(), Shared(far), chance=lambda: chance)
    tiers.put([("m:a", b"0.5")], 60.0)
    await Turns.until(lambda: far.writes)
    assert far.writes[0][0].ttl_s == pytest.approx(shared_s)
    await tiers.close()


async def test_without_a_shared_cache_memory_keeps_it_for_all_its_time() -> None:
    """A cache in this process alone keeps a value for its time, and has nothing to fetch."""
    now = 0.0
    tiers = Tiers(MemoryCache(clock=lambda: now), chance=lambda: 0.0)
    tiers.put([("m:a", b"0.5")], 60.0)
    now = 59.9
    assert tiers.get("m:a") == b"0.5"
    assert not tiers.has_more
    assert list(await tiers.fetch(["m:a"], 60.0)) == [None]
