"""The bounded queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelserve.monitor.log.buffer import Buffer


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(1, 400))))
def test_whatever_comes_and_goes_the_bounds_hold(steps: list[tuple[bool, int, int]]) -> None:
    """Nothing is lost or turned round, and what waits, together with what is being dealt with, is within the bounds."""
    buffer: Buffer[int] = Buffer(max_rows=100, max_bytes=1000)
    accepted, out = [], []
    held: list[tuple[int, int]] = []
    for i, (puts, rows, size) in enumerate(steps):
        fits = sum(r for r, _ in held) + rows <= 100 and sum(s for _, s in held) + size <= 1000
        if puts:
            assert buffer.put(i, rows, size) == fits
            if fits:
                accepted.append(i)
                held.append((rows, size))
        else:
            taken = buffer.take(rows, size)
            out += [entry.item for entry in taken]
            assert len(taken) <= 1 or sum(entry.rows for entry in taken) <= rows
            buffer.release(taken)
            del held[: len(taken)]
        assert buffer.rows == sum(r for r, _ in held)
    assert out == accepted[: len(out)]


def test_something_larger_than_a_batch_still_leaves() -> None:
    """One item at least is taken, however large."""
    buffer: Buffer[str] = Buffer(max_rows=100, max_bytes=1000)
    buffer.put("large", 50, 900)
    buffer.put("small", 1, 1)
    assert [entry.item for entry in buffer.take(10, 10)] == ["large"]
    assert [entry.item for entry in buffer.take(10, 10)] == ["small"]
    assert buffer.take(10, 10) == []
