"""Warm a fresh replica up, and show that it answers the golden example as at registration."""

from __future__ import annotations

import asyncio
from typing import Final

import orjson

from modelserve.errors import InferenceFailed, LoadFailed
from modelserve.execution.supervisor import Infer
from modelserve.signature import Signature
from modelserve.signature.comparison import outputs_match
from modelserve.types import Json

_WARM_UP_LIMIT_S: Final = 60.0
_SLOW_BATCH_S: Final = 0.25  # larger buckets of a model this slow would delay the swap more than they warm
_WARM_UP_RUNS: Final = 3
_QUICK_S: Final = 0.01


class WarmUp:
    """Shows of one replica that it answers: every batch size once, and the golden example as it did at registration.

    ``example`` is the registered document ``{"inputs": [row, …], "outputs": [answer, …] | None}``; without one
    there is nothing to run.
    """

    def __init__(self, signature: Signature, example: Json, *, largest_batch: int, padded: bool = False) -> None:
        self._rows = [] if example is None else [signature.validate(record) for record in example["inputs"]]
        self._expected = None if example is None else example["outputs"]
        self._largest_batch = largest_batch
        self._padded = padded

    async def __call__(self, infer: Infer) -> None:
        """Raise ``LoadFailed`` unless the replica behind ``infer`` answers."""
        if not self._rows:
            return
        try:
            async with asyncio.timeout(_WARM_UP_LIMIT_S):
                await self._warm_up(infer)
                if self._expected is not None:
                    _compare(self._expected, await infer(self._rows))
        except TimeoutError as error:
            raise LoadFailed(f"the warm-up did not end within {_WARM_UP_LIMIT_S:.0f} s") from error
        except InferenceFailed as error:
            raise LoadFailed(f"the warm-up failed: {error}") from error

    async def _warm_up(self, infer: Infer) -> None:
        """Run every batch size that is a power of two, so that no request pays for a first time.

        Each is run a few times if that is quick: the first run of a size, which may have to prepare the model for it,
        tells little about what the next will cost. The sizes that batches are padded to are run however slow they are.
        """
        now = asyncio.get_running_loop().time
        for size in self._sizes():
            rows = [self._rows[i % len(self._rows)] for i in range(size)]
            await infer(rows)
            started, runs = now(), 1
            while runs == 1 or (runs < _WARM_UP_RUNS and now() - started < _QUICK_S):
                await infer(rows)
                runs += 1
            if not self._padded and now() - started > _SLOW_BATCH_S:
                return

    def _sizes(self) -> list[int]:
        powers = [1 << i for i in range(self._largest_batch.bit_length())]
        return sorted({*powers, self._largest_batch}) if self._padded else powers


def _compare(expected: list[Json], answers: list[Json]) -> None:
    """Refuse a version that does not answer its golden example as it did at registration."""
    try:
        found = orjson.loads(orjson.dumps(answers, option=orjson.OPT_SERIALIZE_NUMPY))
    except TypeError as error:
        raise LoadFailed(f"the model's answer to the golden example has no JSON form: {error}") from error
    for i, (wanted, given) in enumerate(zip(expected, found, strict=True)):
        if not outputs_match(wanted, given):
            raise LoadFailed(f"golden example, row {i}: registered answer {_short(wanted)}, got {_short(given)}")


def _short(value: Json) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."  # noqa: PLR2004
