"""The process that holds a model: ``python -m modelserve.execution.worker``, started by a process replica.

It loads one model through its framework adapter and answers batches until its host closes the socket, or is gone. It
imports numpy and that adapter: no routing, no SQL, nothing of the host's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import InferenceFailed, LoadError, LoadFailed, describe, failure_of
from modelserve.execution import wire
from modelserve.execution.arena import Arena
from modelserve.execution.padding import Padded
from modelserve.ports import Framework, Model
from modelserve.signature import Signature, check_outputs
from modelserve.types import Runtime

_PR_SET_PDEATHSIG: Final = 1
_WATCH_S: Final = 1.0
_ALL_BUT_THE_OWNER: Final = 0o077
_MOST_WORDS: Final = 1 << 16  # characters of an error
_READ_AHEAD: Final = 2 * wire.INLINE


def main(arguments: list[str]) -> None:
    """Serve the host behind the inherited descriptors: a socket, then the arenas of requests, then of responses."""
    host, channel, *arenas = map(int, arguments)
    _behave(host)
    with socket.socket(fileno=channel) as connection:
        connection.settimeout(None)  # it does not block, where the host has set a time-out for all sockets
        worker = _Worker(connection, [Arena(fd) for fd in arenas])
        # A host that is gone, or that had no time to wait, has closed the socket: then there is nothing left to do.
        with contextlib.suppress(EOFError, ConnectionError):
            worker.serve()


def _behave(host: int) -> None:
    """End with the host and never before it, and be free of what the host has set for itself alone.

    Signals meant for a group of processes (Ctrl-C, a service manager's SIGTERM) reach workers too, while the host
    still has batches to finish. The closed socket tells an idle worker that its host has died; the watch tells one
    that is busy; the kernel, where it can, tells one that does not let any other thread run.
    """
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, programs that the model runs have no exit status
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(os.umask(_ALL_BUT_THE_OWNER) & _ALL_BUT_THE_OWNER)  # what the model writes, it can read
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(host,), name="modelserve-watch", daemon=True).start()


def _watch(host: int) -> None:
    while os.getppid() == host:
        time.sleep(_WATCH_S)
    os.kill(os.getpid(), signal.SIGKILL)


class _Worker:
    def __init__(self, connection: socket.socket, arenas: list[Arena]) -> None:
        self._connection = connection
        self._reader = io.BufferedReader(connection.makefile("rb", 0), _READ_AHEAD)  # a small frame in one system call
        self._requests = arenas[: wire.ARENAS]
        self._responses = arenas[wire.ARENAS :]

    def serve(self) -> None:
        _, text, _ = self._receive()
        try:
            spec = json.loads(bytes(text))
            if spec["niceness"]:
                os.nice(spec["niceness"])
            signature = Signature.from_json(spec["signature"])
            layout, model = wire.RowLayout(signature.inputs), _load(spec)
        except BaseException as error:  # noqa: BLE001  # whatever loading raises, even to exit, is the host's to know
            self._send(wire.REFUSED, text=_refusal(error))
            return
        self._send(wire.READY)
        while True:
            self._answer(model, layout)

    def _answer(self, model: Model, layout: wire.RowLayout) -> None:
        header, text, block = self._receive()
        began = time.perf_counter()
        try:
            outputs = _infer(model, layout.read(header.rows, block, text), header.rows)
            place = self._place(header.seq, outputs.size)
            outputs.write(place)
        except BaseException as error:  # noqa: BLE001  # even to exit: what a model does is its caller's to see
            self._send(wire.FAILED, text=_failure(error), seq=header.seq)
            return
        told: dict[str, Any] = {"arena": outputs.size} if outputs.size > wire.INLINE else {"block": place}
        seconds = time.perf_counter() - began
        self._send(wire.ANSWER, text=outputs.text, seq=header.seq, rows=header.rows, seconds=seconds, **told)

    def _place(self, seq: int, size: int) -> Any:
        """Return where an answer is written: in shared memory if it is large."""
        return bytearray(size) if size <= wire.INLINE else self._responses[seq % wire.ARENAS].block(size)

    def _receive(self) -> tuple[wire.Header, memoryview, memoryview]:
        header = wire.parse_header(self._exactly(wire.HEADER_BYTES))
        text = self._exactly(header.text)
        if header.block > wire.INLINE:
            return header, text, self._requests[header.seq % wire.ARENAS].read(header.block)
        return header, text, self._exactly(header.block)

    def _exactly(self, size: int) -> memoryview:
        """Read into memory of its own: a model may work on its inputs in place."""
        data = bytearray(size)
        if self._reader.readinto(data) < size:
            raise EOFError
        return memoryview(data)

    def _send(self, kind: int, **parts: Any) -> None:
        self._connection.sendall(wire.frame(kind, **parts))


def _load(spec: dict[str, Any]) -> Model:
    framework: Framework = plugins.resolve(spec["framework"])()
    model = framework.load(Path(spec["path"]), spec["format"], spec["load_options"], Runtime(**spec["runtime"]))
    return Padded(model, spec["pad_to"]) if spec["pad_to"] else model


def _infer(model: Model, columns: Any, rows: int) -> wire.Outputs:
    return wire.outputs_of(check_outputs(model.infer(columns), rows))


def _failure(error: BaseException) -> bytes:
    """Describe why a batch failed."""
    if not isinstance(error, InferenceFailed):
        error = failure_of(error)
    return _described(error)


def _refusal(error: BaseException) -> bytes:
    """Describe why the model did not load."""
    if not isinstance(error, LoadError):
        error = LoadFailed(f"the model did not load: {describe(error)}")
    return _described(error)


def _described(error: Exception) -> bytes:
    return json.dumps([type(error).__name__, str(error)[:_MOST_WORDS]]).encode()


if __name__ == "__main__":
    main(sys.argv[1:])
