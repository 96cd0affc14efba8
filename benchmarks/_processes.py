"""Starting the servers of a benchmark, and stopping them whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_START_LIMIT_S: Final = 60.0
_STOP_LIMIT_S: Final = 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A running server of :mod:`benchmarks._servers`."""

    name: str
    port: int
    pid: int

    def cpu_seconds(self) -> float | None:
        """Return the processor time it has used so far; None where the system does not tell."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[Server]:
    """Run one server on a free port, with its log in ``folder``; yields once it accepts connections."""
    port, log = _free_port(), folder / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks._servers", name, "--port", str(port), "--folder", str(folder)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_listening(process, port, log)
        yield Server(name, port, process.pid)
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    # uvicorn listens only after the application's startup, so after the models have been loaded.
    give_up = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
