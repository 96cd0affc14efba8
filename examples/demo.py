"""The main job, end to end: train, register, serve, replace under load; then with features and a cache.

``KEEP=1`` leaves the server running.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import modelserve as ms
from examples import enriched, flights
from examples.load import Outcome, send_all

REQUESTS: Final = 20_000
CONNECTIONS: Final = 64
_START_LIMIT_S: Final = 60
_PREDICT: Final = f"/ml/predict/{flights.MODEL}"
_console = Console(highlight=False)


def main() -> int:
    """Run the demo; the exit status tells whether every request was answered."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    folder = Path(".demo").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = flights.load_flights()
    registry = ms.Registry(f"sqlite:///{folder}/models.db", artifacts=str(folder / "artifacts"))
    _register_two_versions(registry, rows)
    registry.promote(flights.MODEL, "1.0.0", reason="first version")
    requests = flights.requests_of(rows[rows["month"] == 3].sample(REQUESTS, random_state=0))
    with _serving(folder) as port:
        _show_one(port, requests[0])
        outcome = _send_and_promote_half_way(registry, port, requests)
        _report(outcome)
        enriched.show(registry, folder, max(requests, key=itemgetter("precip")), _console)
        _stay_if_asked(port, requests[0])
    return 0 if not outcome.failures else 1


def _register_two_versions(registry: ms.Registry, rows: pd.DataFrame) -> None:
    past, march = rows[rows["month"] < 3], rows[rows["month"] == 3]
    _console.print(f"[bold]{len(past):,} flights of January and February 2013 to learn from")
    for version, train in (("1.0.0", flights.train_linear), ("2.0.0", flights.train_boosted)):
        started = time.perf_counter()
        model = train(past)
        auc = round(flights.auc(model, march), 4)
        registry.register(
            flights.MODEL,
            version,
            model,
            example=march[flights.INPUTS][:4],
            method="predict_proba",
            metrics={"auc": auc},
        )
        spent = time.perf_counter() - started
        _console.print(f"  registered {flights.MODEL} {version}: {train.__name__}, AUC {auc} in March ({spent:.1f} s)")


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[int]:
    """Run the FastAPI example under uvicorn, in a process of its own, on a free port."""
    port = _free_port()
    settings = {
        "MODELSERVE_REGISTRY": f"sqlite:///{folder}/models.db",
        "MODELSERVE_ARTIFACTS": str(folder / "artifacts"),
        "MODELSERVE_CACHE_DIR": str(folder / "cache"),
        "MODELSERVE_MODELS": json.dumps({flights.MODEL: {"timeout_ms": 10_000}}),  # a busy laptop may halt for a second
        "OMP_NUM_THREADS": "1",  # the trees' own threads would fight the web server for two cores
    }
    command = [sys.executable, "-m", "uvicorn", "examples.fastapi_app.app:app", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--log-level", "warning"], env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_ready(server, port)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ml/health/ready", timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise SystemExit("the server did not become ready; see .demo/server.log")


def _show_one(port: int, inputs: dict[str, Any]) -> None:
    body = {"inputs": inputs}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{_PREDICT}", method="POST")  # our own
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, json.dumps(body).encode(), timeout=10) as response:
        answer = json.load(response)
    _console.print(f"\n[bold]POST {_PREDICT}")
    _console.print_json(data=body)
    _console.print("[bold]200 OK")
    _console.print_json(data=answer)


def _send_and_promote_half_way(registry: ms.Registry, port: int, requests: list[dict[str, Any]]) -> Outcome:
    half = len(requests) // 2
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console) as progress:
        bar = progress.add_task(f"{CONNECTIONS} connections", total=len(requests))
        promoting: list[asyncio.Future[Any]] = []

        def on_answer(answered: int) -> None:
            progress.update(bar, completed=answered)
            if answered == half:
                progress.print("[bold]half-way: promoting 2.0.0 while the requests go on")
                loop = asyncio.get_running_loop()
                promoting.append(loop.run_in_executor(None, registry.promote, flights.MODEL, "2.0.0"))

        bodies = ({"inputs": each} for each in requests)
        return asyncio.run(send_all(port, _PREDICT, bodies, connections=CONNECTIONS, on_answer=on_answer))


def _report(outcome: Outcome) -> None:
    answered = len(outcome.latencies)
    by_version = ", ".join(f"{version}: {count:,}" for version, count in sorted(outcome.versions.items()))
    p50, p95, p99 = (outcome.percentile(share) for share in (0.5, 0.95, 0.99))
    _console.print(f"\n[bold]{answered:,} requests in {outcome.seconds:.1f} s: {answered / outcome.seconds:,.0f}/s")
    _console.print(f"  latency   p50 {p50:.1f} ms   p95 {p95:.1f} ms   p99 {p99:.1f} ms")
    _console.print(f"  answers   {by_version}")
    told = "".join(f"   {count} × {what}" for what, count in outcome.failures.items())
    _console.print(f"  failures  {sum(outcome.failures.values())}{told}")


def _stay_if_asked(port: int, inputs: dict[str, Any]) -> None:
    if not os.environ.get("KEEP"):
        _console.print("\nTo keep it running and try it: [bold]make demo KEEP=1")
        return
    base, body = f"http://127.0.0.1:{port}", json.dumps(inputs)
    _console.print(f"\n[bold]Running at {base} until Ctrl-C. Try:")
    as_json = "-H 'content-type: application/json' -d"
    _console.print(f"curl {base}/ml/predict/{flights.MODEL} {as_json} '{{\"inputs\": {body}}}'", soft_wrap=True)
    _console.print(f"curl {base}/flights/delay {as_json} '{body}'", soft_wrap=True)
    _console.print(f"curl {base}/ml/models/{flights.MODEL}\ncurl {base}/ml/health/ready\ncurl {base}/ml/openapi.json")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
