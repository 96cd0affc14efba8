"""Request ids."""

from __future__ import annotations

import random
import time
import uuid

from modelserve.ids import uuid7_source


def test_ids_are_version_7_uuids_of_this_moment() -> None:
    """Version, variant and the millisecond are where RFC 9562 puts them."""
    before = time.time_ns() // 1_000_000
    made = uuid.UUID(uuid7_source()())
    after = time.time_ns() // 1_000_000
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert before <= made.int >> 80 <= after


def test_ids_do_not_repeat_and_sort_by_time() -> None:
    """A hundred thousand ids are all different, and their order is that of their milliseconds."""
    new = uuid7_source()
    ids = [new() for _ in range(100_000)]
    assert len(set(ids)) == len(ids)
    moments = [text[:13] for text in ids]
    assert moments == sorted(moments)


def test_a_seeded_host_does_not_make_two_sources_alike() -> None:
    """``random.seed`` in the host has no hold on the ids."""
    random.seed(0)
    first = uuid7_source()()
    random.seed(0)
    assert uuid7_source()()[15:] != first[15:]
