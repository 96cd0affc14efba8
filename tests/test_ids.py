"""Request ids and routing keys."""

from __future__ import annotations

import random
import time
import uuid
from typing import Any

import pytest

from modelserve.ids import is_request_id, is_routing_key, uuid7_source


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


@pytest.mark.parametrize(
    ("value", "as_id", "as_key"),
    [
        ("7f3c", True, True),
        ("a b-c:d/e", True, True),
        ("x" * 128, True, True),
        ("x" * 129, False, True),
        ("x" * 256, False, True),
        ("x" * 257, False, False),
        ("José 🐢", True, True),
        ("", False, False),
        ("a\tb", False, False),
        ("a\0b", False, False),
        ("\x7f", False, False),
        ("\udce9", False, False),
        (None, False, False),
        (7, False, False),
        (b"7f3c", False, False),
    ],
)
def test_what_can_be_an_id_and_what_a_key(value: Any, *, as_id: bool, as_key: bool) -> None:
    """An id is 1 to 128 printable characters, a key 1 to 256 of them."""
    assert (is_request_id(value), is_routing_key(value)) == (as_id, as_key)
