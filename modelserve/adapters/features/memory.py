"""Features in the memory of this process: for tests, for trying things out, for a handful of rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.features.layout import decoded
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow, NoValue


class MemoryFeatures:
    """Keeps rows in a dictionary. Each ``memory://`` is a store of its own, and closing it does not empty it."""

    def __init__(self, url: str = "memory://") -> None:
        if url != "memory://":
            raise ConfigError(f"features: a store in memory has neither name nor options: memory://, not {url[:80]!r}")
        self._rows: dict[tuple[str, str], FeatureRecord] = {}
        self._gate = threading.Lock()

    async def read(self, wanted: Sequence[FeatureKey], within_s: float) -> Sequence[FeatureRow | BackendUnavailable]:  # noqa: ARG002  # it is never late
        """Read many rows at once."""
        return [self._row(key) for key in wanted]

    def write(self, records: Sequence[FeatureRecord]) -> None:
        """Write rows, each in place of the one before it."""
        with self._gate:
            self._rows.update({(record.group, record.key): record for record in records})

    def ping(self) -> None:
        """Do nothing: it is there."""

    async def close(self) -> None:
        """Do nothing: there are no connections."""

    def _row(self, wanted: FeatureKey) -> FeatureRow:
        record = self._rows.get((wanted.group, wanted.key))
        if record is None:
            return FeatureRow((NoValue.MISSING,) * len(wanted.names), None)
        return FeatureRow(tuple(decoded(record.values.get(name)) for name in wanted.names), record.written_at)
