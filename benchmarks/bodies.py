"""How long one request holds the event loop, whatever its body holds.

A task that does nothing but take its turn measures the longest time between two of them while the request is answered;
beside it stands what parsing the body at once takes, and the longest turn of an idle loop in the same run. Each body is
asked of models with the options of each mode: plain, with a cache, with a log of every request, in worker processes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Literal

import numpy as np
import orjson

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, open_registry, print_table, report
from benchmarks._models import first_element, length_of
from modelserve.http.api import Api
from modelserve.http.messages import Request
from modelserve.signature import MAX_BODY_BYTES

_HOLD_MS: Final = 50.0
_SIDE: Final = 512
_PATIENT: Final[Mapping[str, Any]] = {"timeout_ms": 60_000, "slo_ms": 60_000, "max_batch_size": 1024}
_MODES: Final[Mapping[str, Mapping[str, Any]]] = {
    "plain": {},
    "cache": {"cache_ttl_s": 60},
    "log": {"log_sample_rate": 1.0},
    "process": {"executor": "process"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A body for a model, and the status that answers it."""

    what: str
    model_name: str
    body: Callable[[], bytes]
    status: int


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES))
    options = parser.parse_args()
    print(machine())
    rows: list[dict[str, Any]] = []
    for mode in options.modes:
        with tempfile.TemporaryDirectory() as folder:
            rows += asyncio.run(_measured(Path(folder), mode, rounds=1 if options.quick else 3))
    print_table("the longest hold of the loop by one request, ms", rows)
    ours = [row for row in rows if row["request"] != "none"]
    budgets = [
        Budget(f"hold by {row['request']}, {row['mode']}, ms", _HOLD_MS, row["hold"], at_least=False) for row in ours
    ]
    report("bodies", quick=options.quick, rows=rows, budgets=budgets)


async def _measured(folder: Path, mode: str, rounds: int) -> list[dict[str, Any]]:
    with open_registry(folder) as registry:
        for name, (field, model) in _models().items():
            registry.register(name, "1", model, signature=ms.Signature([field]), method="transform", trusted=_TRUSTED)
            registry.promote(name, "1")
        names = dict.fromkeys(_models(), ms.ModelOptions(**_PATIENT, **_MODES[mode]))
        log: Literal[False] | None = None if mode == "log" else False
        async with ms.AsyncModelServer(registry, names, cache_dir=folder / "cache", log=log) as server:
            api = Api(server)
            rows = [_row(mode, "none", [await _hold(asyncio.sleep(0.3)) for _ in range(rounds)], "-", 0)]
            for case in _CASES:
                body = case.body()
                holds = [await _hold(_asked(api, case, body)) for _ in range(rounds)]
                rows.append(_row(mode, case.what, holds, _at_once(body), len(body)))
                print(rows[-1], flush=True)
            return rows


def _row(mode: str, what: str, holds: list[float], bare: float | str, size: int) -> dict[str, Any]:
    return {"mode": mode, "request": what, "hold": min(holds), "worst": max(holds), "at once": bare, "MB": size / 1e6}


async def _asked(api: Api, case: Case, body: bytes) -> None:
    response = await api(Request("POST", f"/predict/{case.model_name}", body, {}, "r"))
    assert response.status == case.status, (case.what, response.status, response.body[:300])


async def _hold(work: Any) -> float:
    """Return the longest time in milliseconds between two turns of the loop during some work."""
    longest, task = 0.0, asyncio.ensure_future(work)
    before = perf_counter()
    while not task.done():
        await asyncio.sleep(0)
        now = perf_counter()
        longest, before = max(longest, now - before), now
    await task
    return longest * 1000


def _at_once(body: bytes) -> float:
    began = perf_counter()
    orjson.loads(body)
    return (perf_counter() - began) * 1000


# -- models and bodies -------------------------------------------------------------------------------------

_TRUSTED: Final = ["benchmarks._models.first_element", "benchmarks._models.length_of"]


def _models() -> dict[str, tuple[ms.Field, Any]]:
    from sklearn.preprocessing import FunctionTransformer  # noqa: PLC0415  # slow to import

    numbers, strings = FunctionTransformer(first_element), FunctionTransformer(length_of)
    return {
        "small": (ms.Field("x", "float64", (4,)), numbers),
        "picture": (ms.Field("x", "uint8", (_SIDE, _SIDE, 3)), numbers),
        "rows": (ms.Field("x", "float64", (1000,)), numbers),
        "long": (ms.Field("x", "float32", (4_000_000,)), numbers),
        "text": (ms.Field("x", "string"), strings),
        "words": (ms.Field("x", "string", (4000,)), strings),
        "vocabulary": (ms.Field("x", "string", (4_000_000,)), strings),
    }


def _filled(element: bytes, size: int = MAX_BODY_BYTES, member: bytes = b"inputs") -> bytes:
    count = (size - 100) // (len(element) + 1)
    return b'{"%b": {"x": [%b]}}' % (member, b",".join([element] * count))


def _empties(size: int) -> bytes:
    return b'{"instances": [%b]}' % b",".join([b"[]"] * (size // 3))


def _batch() -> bytes:
    rng = np.random.default_rng(7)
    return orjson.dumps({"instances": [{"x": rng.normal(size=1000).round(12).tolist()} for _ in range(1000)]})


def _of_strings(rows: int, text: str) -> bytes:
    return orjson.dumps({"instances": [{"x": text}] * rows})


def _of_words() -> bytes:
    return orjson.dumps({"instances": [{"x": ["a"] * 4000}] * 1000})


def _exactly(count: int, element: bytes) -> bytes:
    return b'{"inputs": {"x": [%b]}}' % b",".join([element] * count)


def _picture() -> bytes:
    pixels = np.random.default_rng(8).integers(0, 256, (_SIDE, _SIDE, 3))
    return orjson.dumps({"inputs": {"x": pixels.tolist()}})


_CASES: Final = (
    Case("empty lists, 0.75 MB", "small", lambda: _empties(750_000), 413),
    Case("empty lists, 0.75 MB, no such model", "nothing", lambda: _empties(750_000), 404),
    Case("empty lists, 16 MiB, for pictures", "picture", lambda: _empties(MAX_BODY_BYTES), 413),
    Case("numbers, 16 MiB", "small", lambda: _filled(b"0.5"), 413),
    Case("numbers, 16 MiB, for pictures", "picture", lambda: _filled(b"7.25"), 422),
    Case("strings, 16 MiB", "small", lambda: _filled(b'"ab"'), 413),
    Case("a string, 16 MiB", "text", lambda: _of_strings(1, "a" * (MAX_BODY_BYTES - 100)), 200),
    Case("a string of escapes, 16 MiB", "text", lambda: _of_strings(1, "\n" * (MAX_BODY_BYTES // 2 - 100)), 200),
    Case("1000 strings, 16 MiB", "text", lambda: _of_strings(1000, "é" * 8000), 200),
    Case("a batch of 1000 rows of 1000 doubles", "rows", _batch, 200),
    Case("a row of 4,000,000 numbers", "long", lambda: _exactly(4_000_000, b"0.5"), 200),
    Case("a row of 4,000,000 strings", "vocabulary", lambda: _exactly(4_000_000, b'"a"'), 200),
    Case("1000 rows of 4000 strings", "words", _of_words, 200),
    Case("a picture of 512 × 512 × 3", "picture", _picture, 200),
)

if __name__ == "__main__":
    main()
