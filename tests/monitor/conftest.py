"""A place to log to."""

from __future__ import annotations

import pytest

from tests.monitor.answers import Store


@pytest.fixture
def store() -> Store:
    """A place that takes everything."""
    return Store()
