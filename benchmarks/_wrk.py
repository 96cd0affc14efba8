"""The same load sent by ``wrk``, to check that the built-in generator is no part of the figure."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("_wrk.lua")


@dataclasses.dataclass(frozen=True, slots=True)
class WrkOutcome:
    """What wrk counted. Latencies are milliseconds; ``failures`` are non-2xx answers and socket errors together."""

    rate: float
    p50_ms: float
    p99_ms: float
    failures: int


def wrk_is_here() -> bool:
    return shutil.which("wrk") is not None


def run_wrk(port: int, path: str, bodies: Sequence[bytes], connections: int, seconds: float) -> WrkOutcome:
    """Send the bodies round and round from one thread over so many connections."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(_SCRIPT)]
    url = f"http://127.0.0.1:{port}{path}"
    result = subprocess.run(
        [*command, url], input=b"\n".join(bodies) + b"\n", capture_output=True, check=True, timeout=60 + seconds
    )
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return WrkOutcome(
        found["requests"] / found["seconds"], found["p50_us"] / 1000, found["p99_us"] / 1000, found["failures"]
    )
