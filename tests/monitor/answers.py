"""Answers to log and to count, and a place to log them that can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from modelserve.errors import BackendUnavailable
from modelserve.events import Served
from modelserve.signature import Field, Signature
from modelserve.types import LogRecord
from tests.serving.versions import version_of

SIGNATURE = Signature([Field("tenure", "int64"), Field("plan", "string")])


def served(
    request_id: str = "r",
    rows: int = 1,
    *,
    model_name: str = "m",
    version: str = "1",
    sha256: str = "ab" * 32,
    **changed: Any,
) -> Served:
    """Make a successful answer to so many rows."""
    plain = Served(
        model_name=model_name,
        version=version,
        request_id=request_id,
        rows=rows,
        latency_ms=2.5,
        error=None,
        inputs=[SIGNATURE.validate({"tenure": i, "plan": "pro"}) for i in range(rows)],
        values=[i / 10 for i in range(rows)],
        meta=version_of(model_name, version, sha256),
        signature=SIGNATURE,
    )
    return plain._replace(**changed)


class Store:
    """Keeps records in memory; it is down, or refuses some of them, when it is told to."""

    shown_url = "memory"

    def __init__(self) -> None:
        self.records: dict[str, LogRecord] = {}
        self.attempts = 0
        self.allowed = True
        self.asked = threading.Event()
        self.down = threading.Event()
        self.refused: Callable[[LogRecord], bool] = lambda _: False
        self.changed = threading.Condition()
        self.closed = False

    def may_write(self) -> bool:
        self.asked.set()
        return self.allowed

    def append(self, records: Sequence[LogRecord]) -> None:
        with self.changed:
            self.attempts += 1
            self.changed.notify_all()
            if self.down.is_set():
                raise BackendUnavailable("inference log", "it is down")
            if any(self.refused(record) for record in records):
                raise ValueError("cannot hold this")
            self.records |= {record.id: record for record in records}

    def close(self) -> None:
        self.closed = True

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something was tried and the condition holds."""
        with self.changed:
            assert self.changed.wait_for(condition, 20)
