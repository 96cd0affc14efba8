"""The cache in this process: its bounds, its order, its clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelserve.caching.memory import _OVERHEAD, MemoryCache

ROOMY = 10**9


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_value_counts_until_its_time_is_over_and_not_at_that_moment() -> None:
    """A value of ten seconds is there after 9.9 and gone after 10, with the bytes that it took."""
    clock = Clock()
    cache = MemoryCache(clock=clock)
    cache.put("a", b"1", 10.0)
    clock.now = 9.9
    assert cache.get("a") == b"1"
    clock.now = 10.0
    assert cache.get("a") is None
    assert (len(cache), cache.size) == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    """Reading a value makes it stay; the one that nobody asked for makes room."""
    cache = MemoryCache(max_entries=2)
    for key in ("a", "b"):
        cache.put(key, b"1", 60.0)
    cache.get("a")
    cache.put("c", b"1", 60.0)
    assert [cache.get(key) for key in ("a", "b", "c")] == [b"1", None, b"1"]


def test_what_never_fits_displaces_nothing() -> None:
    """A value larger than the cache is not kept, ends the one before it, and leaves the others."""
    cache = MemoryCache(max_bytes=2 * _OVERHEAD + 100)
    cache.put("a", b"1", 60.0)
    cache.put("b", b"1", 60.0)
    cache.put("b", b"x" * 10_000, 60.0)
    assert [cache.get("a"), cache.get("b")] == [b"1", None]


def test_no_time_at_all_is_not_kept() -> None:
    """A value with a time of zero, or less, is not there afterwards."""
    cache = MemoryCache(clock=Clock())
    cache.put("a", b"1", 0.0)
    cache.put("b", b"1", -1.0)
    assert len(cache) == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abcdef"), st.binary(max_size=600), st.floats(0.1, 20.0)),
        st.tuples(st.just("get"), st.sampled_from("abcdef")),
        st.tuples(st.just("pass"), st.floats(0.0, 10.0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_is_done_it_answers_the_last_value_or_none_and_keeps_its_bounds(
    steps: list[tuple[object, ...]],
) -> None:
    """Beside a dict that forgets nothing: no value of another key, none that is old, and never more than the bounds."""
    clock = Clock()
    cache = MemoryCache(max_entries=4, max_bytes=4 * _OVERHEAD, clock=clock)
    truth: dict[str, tuple[bytes, float]] = {}
    for step in steps:
        match step:
            case ("put", str(key), bytes(value), float(ttl_s)):
                cache.put(key, value, ttl_s)
                truth[key] = (value, clock.now + ttl_s)
            case ("get", str(key)):
                found = cache.get(key)
                value, until = truth.get(key, (b"", 0.0))
                assert found is None or (found == value and clock.now < until)
            case ("pass", float(seconds)):
                clock.now += seconds
        assert len(cache) <= 4
        assert cache.size <= 4 * _OVERHEAD
        assert cache.size == sum(len(key) + len(value) + _OVERHEAD for key, (value, _) in cache._entries.items())


@given(st.dictionaries(st.text(), st.binary(), max_size=30))
def test_with_room_and_time_nothing_is_forgotten(values: dict[str, bytes]) -> None:
    """Without need nothing goes."""
    cache = MemoryCache(max_entries=30, max_bytes=ROOMY, clock=Clock())
    for key, value in values.items():
        cache.put(key, value, 60.0)
    assert {key: cache.get(key) for key in values} == values
