"""Descriptors and the numbers of the standard streams."""

from __future__ import annotations

import fcntl
import os
from types import SimpleNamespace

import pytest

from modelserve.execution import descriptors


def test_a_descriptor_keeps_away_from_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor with the number of a stream is moved, another is left where it is."""
    closed: list[int] = []
    monkeypatch.setattr(descriptors, "os", SimpleNamespace(close=closed.append))
    moved = descriptors.lifted(1)
    try:
        assert moved > 2
        assert closed == [1]
        assert fcntl.fcntl(moved, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert descriptors.lifted(moved) == moved
    finally:
        os.close(moved)
