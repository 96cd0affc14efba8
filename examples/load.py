"""A small closed-loop HTTP client: so many connections, each sending its next request when it has its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@dataclasses.dataclass(slots=True)
class Outcome:
    """What the requests came to. ``latencies`` are seconds, in the order of the answers."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    versions: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0

    def percentile(self, share: float) -> float:
        """Return the latency in milliseconds that ``share`` of the answers did not exceed."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))] * 1000


async def send_all(
    port: int, path: str, bodies: Iterable[dict[str, Any]], *, connections: int, on_answer: Callable[[int], None]
) -> Outcome:
    """POST every body as JSON, over so many connections at once; ``on_answer`` gets the number answered so far."""
    outcome, started = Outcome(), time.perf_counter()
    left = iter([_encode(path, body) for body in bodies])
    await asyncio.gather(*(_send_from(left, port, outcome, on_answer) for _ in range(connections)))
    outcome.seconds = time.perf_counter() - started
    return outcome


async def _send_from(left: Iterator[bytes], port: int, outcome: Outcome, on_answer: Callable[[int], None]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for request in left:
            started = time.perf_counter()
            writer.write(request)
            status, answer = await _read_answer(reader)
            outcome.latencies.append(time.perf_counter() - started)
            if status == 200:
                outcome.versions[answer["model_version"]] += 1
            else:
                outcome.failures[f"HTTP {status}"] += 1
            on_answer(len(outcome.latencies))
    except (OSError, EOFError) as error:
        outcome.failures[type(error).__name__] += 1
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), json.loads(await reader.readexactly(length))


def _encode(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data
