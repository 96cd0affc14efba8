"""What of a model's options cannot work, from what its warm-up took."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.config import ModelOptions
from modelserve.features.declaration import Features
from modelserve.serving.feasibility import misfits
from modelserve.types import Scaling

GB = 10**9
SLOW, QUICK = {1: 1.5, 2: 3.0}, {1: 0.001, 2: 0.001, 256: 0.01}
PATIENT = {"timeout_ms": 10_000, "slo_ms": 5_000}


@pytest.mark.parametrize(
    ("options", "seconds", "found"),
    [
        ({"slo_ms": 2_000}, SLOW, ["timeout_ms=1000 is less than the 1.5 s that one row takes"]),
        ({"timeout_ms": 2_000}, SLOW, ["slo_ms=100 is less than the 1.5 s that one row takes"]),
        (PATIENT, {1: 1.5}, ["hang_limit_s=1 is less than the 1.5 s that a batch takes"]),
        (PATIENT, SLOW, []),
        (PATIENT | {"hang_limit_s": 2}, {1: 1.5}, []),
        ({}, QUICK, []),
        ({}, {}, []),
        ({"queue_limit": 16, "max_batch_size": 64}, {}, ["max_batch_size=64 is never reached: queue_limit=16"]),
        ({"queue_limit": 16}, {}, []),
        ({"queue_limit": 40, "replicas": (1, 4)}, {}, ["scaling.out_above=50 is never exceeded by queue_limit=40"]),
        ({"queue_limit": 40, "replicas": 4}, {}, []),
        ({"queue_limit": 40, "replicas": (1, 4), "scaling": Scaling(out_above=20)}, {}, []),
        ({"max_wait_ms": 200}, QUICK, ["max_wait_ms=200 uses up slo_ms=100"]),
        (
            {"features": Features(entity="user", names=("age",), budget_ms=999.5)},
            QUICK,
            ["features.budget_ms=999.5 leaves too little of timeout_ms=1000 for the 0.001 s"],
        ),
        ({"features": Features(entity="user", names=("age",), budget_ms=10)}, QUICK, []),
    ],
)
def test_each_option_that_cannot_work_is_named_with_both_figures(
    options: dict[str, Any], seconds: dict[int, float], found: list[str]
) -> None:
    """A sentence for each, which begins with the option; none where all is well or nothing was measured."""
    sentences = misfits(ModelOptions(**options), seconds)
    assert len(sentences) == len(found)
    assert all(map(str.startswith, sentences, found)), sentences


@pytest.mark.parametrize(("ttl_s", "strings", "found"), [(60, 65_536, 0), (60, 65_537, 1), (0, 65_537, 0)])
def test_a_cache_that_takes_no_row_of_the_model_is_named(ttl_s: float, strings: int, found: int) -> None:
    """A row of very many strings has no key, so the option has no effect; there is none to name where it is off."""
    sentences = misfits(ModelOptions(cache_ttl_s=ttl_s), {}, strings=strings)
    assert [sentence.split("=")[0] for sentence in sentences] == ["cache_ttl_s"] * found


@pytest.mark.parametrize(
    ("options", "memory", "found"),
    [
        ({"replicas": (1, 8)}, 7 * GB, "replicas=8 take at least 8,000 MB of memory, and there are 7,000 MB"),
        ({}, 1.5 * GB, 'reload="overlap" needs at least 2,000 MB of memory'),
        ({"reload": "replace"}, 1.5 * GB, None),
        ({"replicas": (1, 8)}, 8 * GB, None),
    ],
)
def test_what_memory_can_never_hold_is_named(options: dict[str, Any], memory: float, found: str | None) -> None:
    """Neither the replicas that were asked for, nor the next version beside this one, can ever be there."""
    sentences = misfits(ModelOptions(**options), QUICK, replica_bytes=GB, memory_bytes=int(memory))
    assert [sentence[: len(found or "")] for sentence in sentences] == ([found] if found else [])


@given(
    row_s=st.floats(1e-6, 100), timeout_ms=st.floats(1, 1e6), slo_ms=st.floats(1, 1e6), hang_limit_s=st.floats(0, 100)
)
def test_no_finding_without_its_reason(row_s: float, timeout_ms: float, slo_ms: float, hang_limit_s: float) -> None:
    """An option is named exactly if it is below what was measured, and its own value is in the sentence."""
    options = ModelOptions(timeout_ms=timeout_ms, slo_ms=slo_ms, hang_limit_s=hang_limit_s)
    named = {sentence.partition("=")[0] for sentence in misfits(options, {1: row_s})}
    limits = {"timeout_ms": timeout_ms / 1000, "slo_ms": slo_ms / 1000, "hang_limit_s": hang_limit_s}
    assert {name for name, limit_s in limits.items() if row_s > limit_s * (1 + 1e-9)} <= named
    assert named <= {name for name, limit_s in limits.items() if row_s > limit_s * (1 - 1e-9)}
