"""A version that can answer, with the leases of the requests on it; drained and freed when the last is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

from modelserve.config import ModelOptions
from modelserve.features.plan import FeaturePlan, Pending
from modelserve.serving.feasibility import MOST_CACHED_STRINGS
from modelserve.serving.hand_over import HandOver
from modelserve.signature import Signature
from modelserve.signature.digest import input_digest
from modelserve.types import ModelVersion, Row


class LoadedVersion:
    """A version that can answer: its signature, its pool, and a count of the requests on it.

    A request holds a lease from choosing the version to its answer; :meth:`unload` waits for the last of them.
    """

    __slots__ = (
        "_digest",
        "_drained",
        "_held",
        "_leases",
        "cache_ttl_s",
        "caches_by_request",
        "hand_over",
        "meta",
        "options",
        "plan",
        "pool",
        "request_key",
        "signature",
        "timeout_s",
        "validate",
        "warnings",
    )

    def __init__(
        self,
        meta: ModelVersion,
        options: ModelOptions,
        signature: Signature,
        hand_over: HandOver,
        held: contextlib.ExitStack,
        *,
        plan: FeaturePlan | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.meta = meta
        self.options = options
        self.signature = signature
        self.plan = plan
        self.pool = hand_over.pool
        self.hand_over = hand_over
        self.timeout_s = options.timeout_ms / 1000
        self.warnings = tuple(warnings)
        """What of its options cannot work."""
        self.cache_ttl_s = options.cache_ttl_s if signature.strings <= MOST_CACHED_STRINGS else 0.0
        self._digest = input_digest(meta, signature.canonical)
        self.request_key = None if plan is None or options.cache_key == "merged" else _request_key(meta, plan)
        """Returns the key of what is answered to a request without regard to its features; None where these count."""
        self.caches_by_request = self.cache_ttl_s > 0 and self.request_key is not None
        self.validate: Callable[[Any], Any] = signature.validate if plan is None else plan.validate
        """Returns one instance as a row, or as what its features are still missing from. Raises ``InvalidInput``."""
        self._held = held  # what has to stay on the disk
        self._leases = 0
        self._drained: asyncio.Event | None = None

    def cache_key(self, row: Row) -> str:
        """Return the key of what this version answers to a row: the model's name and the digest of the input."""
        return f"{self.meta.model_name}:{self._digest(row).hex()}"

    def __enter__(self) -> Self:
        self._leases += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._leases -= 1
        if self._leases == 0 and self._drained is not None:
            self._drained.set()

    async def unload(self) -> None:
        """Wait until no request is on this version, then free it."""
        if self._leases:
            self._drained = asyncio.Event()
            await self._drained.wait()
        try:
            await self.hand_over.stop()
        finally:
            self._held.close()

    def abandon(self) -> None:
        """Free it without the loop, which has ended, and with it every request."""
        self.pool.abandon()
        self._held.close()


def _request_key(meta: ModelVersion, plan: FeaturePlan) -> Callable[[Pending], str]:
    digest = input_digest(meta, plan.canonical)
    return lambda pending: f"{meta.model_name}:request:{digest(pending).hex()}"
