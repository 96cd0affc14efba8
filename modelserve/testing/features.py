"""The contract of a feature store, as tests. Inherit :class:`FeatureStoreContract` and say what to run it on.

::

    class TestMyFeatures(FeatureStoreContract):
        @pytest.fixture
        async def store(self) -> AsyncIterator[FeatureStore]:  # an empty one, closed afterwards
            ...

A store that others publish to, in their own way, has the reading half of it: :class:`FeatureReadingContract`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import pytest

from modelserve.features.layout import encoded
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow, FeatureStore, NoValue

_LIMIT_S: Final = 20.0
_ODD_KEYS: Final = ("42", "a:b", "a", " ", "*", "ключ", "🔑", "x" * 512, "new\nline", "\x00")
_VALUES: Final[dict[str, Any]] = {
    "float": 0.1 + 0.2,
    "tiny": 5e-324,
    "large": 1.7976931348623157e308,
    "whole": 2**63 - 1,
    "text": 'naïve ☕ "quoted" \\ \x00',
    "empty": "",
    "flag": True,
    "null": None,
    "vector": [1.5, -2.25, 3.0],
    "with:colon and space": -0.0,
}


def record(key: str, values: dict[str, Any], *, group: str = "user_id", written_at: float = 1_700_000_000.0) -> Any:
    """Return a row as :class:`modelserve.FeatureWriter` would write it."""
    return FeatureRecord(group, key, encoded(values), written_at)


def telling(key: str) -> dict[str, Any]:
    """Return values that tell whose they are."""
    return {"me": key, "size": len(key)}


async def read(store: FeatureStore, *wanted: FeatureKey) -> list[FeatureRow]:
    """Read rows that nothing keeps from being read."""
    found = await store.read(wanted, _LIMIT_S)
    assert len(found) == len(wanted)
    assert all(isinstance(row, FeatureRow) for row in found), found
    return [row for row in found if isinstance(row, FeatureRow)]


@pytest.mark.asyncio
class FeatureReadingContract:
    """What was published is what is read, row by row, with its time to the second.

    Rows are of the groups ``user_id`` and ``item_id``, whose keys are text. A store with a schema has the features of
    ``schema`` in both.
    """

    schema: ClassVar[Mapping[str, Any]] = {**_VALUES, "a": 1, "b": 1, "me": "text", "size": 1}
    """The features of both groups, each with a value that tells its type (null: of any)."""

    async def publish(self, store: FeatureStore, records: Sequence[FeatureRecord]) -> None:
        """Put rows, each with nothing before it, where the store reads them."""
        await asyncio.to_thread(store.write, records)

    async def test_it_satisfies_the_port(self, store: FeatureStore) -> None:
        """It has the methods of :class:`modelserve.ports.FeatureStore`, and answers a ping."""
        assert isinstance(store, FeatureStore)
        await asyncio.to_thread(store.ping)

    async def test_every_value_comes_back_exactly(self, store: FeatureStore) -> None:
        """Numbers to the last bit, text, booleans, null and lists are what they were, and so is the time."""
        await self.publish(store, [record("42", _VALUES)])
        (row,) = await read(store, FeatureKey("user_id", "42", tuple(_VALUES)))
        assert [repr(value) for value in row.values] == [repr(value) for value in _VALUES.values()]  # no frame
        assert row.written_at == 1_700_000_000.0  # noqa: PLR2004  # what was written

    async def test_what_is_not_there_is_missing(self, store: FeatureStore) -> None:
        """A row that was never written has neither values nor a time; one that was lacks what it was not given."""
        await self.publish(store, [record("1", {"a": 1})])
        never, there = await read(store, FeatureKey("user_id", "2", ("a", "b")), FeatureKey("user_id", "1", ("b", "a")))
        assert never == FeatureRow((NoValue.MISSING, NoValue.MISSING), None)
        assert there.values == (NoValue.MISSING, 1)

    async def test_rows_are_told_apart(self, store: FeatureStore) -> None:
        """Keys of any characters, and equal keys of two groups, are rows of their own."""
        groups = ("user_id", "item_id")
        rows = [record(key, {"me": f"{group}/{key}"}, group=group) for key in _ODD_KEYS for group in groups]
        await self.publish(store, rows)
        wanted = [FeatureKey(group, key, ("me",)) for key in _ODD_KEYS for group in groups]
        found = await read(store, *wanted)
        assert [row.values[0] for row in found] == [f"{each.group}/{each.key}" for each in wanted]

    async def test_many_rows_come_in_the_order_asked(self, store: FeatureStore) -> None:
        """More rows than one request takes, some twice, some with other features, are each at their place."""
        keys = [str(number) for number in range(230)]
        await self.publish(store, [record(key, telling(key)) for key in keys])
        asked = random.Random(20).choices([*keys, "nobody"], k=300)  # noqa: S311  # no secret
        names = [("me", "size") if i % 2 else ("size",) for i in range(len(asked))]
        wanted = [FeatureKey("user_id", key, each) for key, each in zip(asked, names, strict=True)]
        for key, row in zip(wanted, await read(store, *wanted), strict=True):
            values = telling(key.key) if key.key != "nobody" else {}
            assert row.values == tuple(values.get(name, NoValue.MISSING) for name in key.names)

    async def test_concurrent_reads_get_their_own(self, store: FeatureStore) -> None:
        """Reads that run at once do not mix."""
        keys = [str(number) for number in range(40)]
        await self.publish(store, [record(key, telling(key)) for key in keys])
        reads = [read(store, FeatureKey("user_id", key, ("me",))) for key in keys[:4] * 10]
        for i in range(0, len(reads), 4):
            found = await asyncio.gather(*reads[i : i + 4])
            assert [rows[0].values[0] for rows in found] == keys[:4]

    async def test_it_can_be_used_after_it_was_closed(self, store: FeatureStore) -> None:
        """Closing twice is no error, and a later read opens what it needs."""
        await self.publish(store, [record("1", {"a": 1})])
        await store.close()
        await store.close()
        assert (await read(store, FeatureKey("user_id", "1", ("a",))))[0].values == (1,)
        await asyncio.to_thread(store.ping)


class FeatureStoreContract(FeatureReadingContract):
    """Besides, what is written takes the place of what was there."""

    async def test_a_row_is_replaced_whole(self, store: FeatureStore) -> None:
        """After another write nothing is left of the values before, whose time would be wrong."""
        await asyncio.to_thread(store.write, [record("1", {"a": 1, "b": 1}, written_at=100.0)])
        await asyncio.to_thread(store.write, [record("1", {"b": 2}, written_at=200.0)])
        (row,) = await read(store, FeatureKey("user_id", "1", ("a", "b")))
        assert row == FeatureRow((NoValue.MISSING, 2), 200.0)

    async def test_the_last_of_several_writes_counts(self, store: FeatureStore) -> None:
        """A batch of writes may hold a row twice."""
        await asyncio.to_thread(store.write, [record("1", {"a": number}) for number in range(3)])
        assert (await read(store, FeatureKey("user_id", "1", ("a",))))[0].values == (2,)

    async def test_the_last_write_counts_also_when_its_time_is_older(self, store: FeatureStore) -> None:
        """A row is what was written last, with the time that was given, to a fraction of a second."""
        await asyncio.to_thread(store.write, [record("1", {"a": 1}, written_at=200.0)])
        await asyncio.to_thread(store.write, [record("1", {"a": 2}, written_at=100.25)])
        assert await read(store, FeatureKey("user_id", "1", ("a",))) == [FeatureRow((2,), 100.25)]
