"""A replica in a process of its own.

The process is a fresh interpreter (``python -m modelserve.execution.worker``): no fork, which copies locks in
whatever state they are, and no multiprocessing, which imports the host's main module again. The model has an
interpreter lock of its own, can be killed, and takes nobody with it when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from modelserve.errors import (
    ArtifactUnsafe,
    InferenceFailed,
    LoadFailed,
    ModelServeError,
    OutOfMemory,
    WorkerDied,
    describe,
)
from modelserve.execution import inheritance, wire
from modelserve.execution.arena import Arena
from modelserve.execution.descriptors import lifted_socket
from modelserve.ports import NotRun
from modelserve.signature import Signature, unstack
from modelserve.types import SAFE, Columns, Json, Row, Runtime

_log = logging.getLogger("modelserve")
_STOP_S: Final = 5.0  # how long a worker may take to finish its batch and end, before it is killed
_DRAIN_S: Final = 0.1  # how long a dead worker's socket may stay open: somebody else may hold its other end
_MODULE: Final = "modelserve.execution.worker"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker loads, and how it may run.

    ``framework`` is the dotted path of the adapter (``"package.module:Class"``). ``niceness`` lowers
    the priority (0: the host's own, 19: whatever others leave). With ``pad_to`` batches of up to so many rows
    are padded to powers of two (see :class:`modelserve.execution.padding.Padded`).
    """

    framework: str
    path: str
    format: str
    load_options: Mapping[str, Json]
    signature: Json
    runtime: Runtime = SAFE
    pad_to: int | None = None
    niceness: int = 0


@dataclasses.dataclass(slots=True)
class _Sent:
    """A batch in the worker's hands."""

    seq: int
    rows: int
    answer: asyncio.Future[list[Json]]


class ProcessReplica:
    """Starts a worker process, hands it batches, and knows at once when it is gone."""

    def __init__(self, spec: WorkerSpec, signature: Signature, *, name: str = "modelserve-worker") -> None:
        self._spec = spec
        self._name = name
        self._layout = wire.RowLayout(signature.inputs)
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._arenas: list[Arena] = []
        self._sent: deque[_Sent] = deque()
        self._batches = 0
        self._ready = False
        self._ending: str | None = None
        self._status: int | None = None
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[str] = self._loop.create_future()

    async def start(self) -> None:
        """Start the worker and have it load the model. Raises ``LoadError``."""
        try:
            connection = self._spawn()
            self._transport, _ = await self._loop.create_unix_connection(
                lambda: _Frames(self._received, self._lost), sock=connection
            )
            self._transport.write(wire.frame(wire.START, text=json.dumps(dataclasses.asdict(self._spec)).encode()))
            await self._loaded
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # no such program, no descriptor, no thread, an odd variable
            self.kill(f"it could not be started: {error}")
            raise LoadFailed(f"the worker process could not be started: {error}") from error
        except BaseException as error:
            self.kill(f"it did not start: {error}")
            raise
        self._ready = True

    def infer(self, rows: Sequence[Row]) -> asyncio.Future[list[Json]]:
        """Write the rows where the worker reads them as columns; its answer is unstacked here."""
        answer: asyncio.Future[list[Json]] = self._loop.create_future()
        if self._ending is not None or self._transport is None:
            answer.set_exception(NotRun())
            return answer
        sent = _Sent(self._batches + 1, len(rows), answer)
        try:
            frame = self._batch(sent, rows)
        except (OSError, MemoryError) as error:
            answer.set_exception(OutOfMemory(f"no memory to hand {len(rows)} rows over: {describe(error)}"))
            return answer
        except Exception as error:  # noqa: BLE001  # values that cannot cross: this batch's failure alone
            answer.set_exception(InferenceFailed(f"{len(rows)} rows could not be handed over: {describe(error)}"))
            return answer
        self._batches = sent.seq
        self._sent.append(sent)
        self._transport.write(frame)
        return answer

    async def stop(self) -> None:
        """Let the worker finish its batch and end; kill it if it does not."""
        if self._process is None:
            self.kill("it was stopped")
            return
        if self._ending is None:
            self._ending = "it was stopped"
            if self._transport is not None:
                self._transport.write_eof()
            await asyncio.wait([self._ended], timeout=_STOP_S)
        if not self._ended.done():
            self._process.kill()
            await asyncio.wait([self._ended])

    def kill(self, reason: str) -> None:
        """End the worker at once, whatever it does."""
        self._ending = self._ending or reason
        if self._process is not None:
            self._process.kill()
        elif not self._ended.done():
            self._ended.set_result(f"{self._ending} (it was never started)")
        self._give_up()

    async def ended(self) -> str:
        """Wait until the process is gone; say why, and how it ended."""
        return await asyncio.shield(self._ended)

    @property
    def alive(self) -> bool:
        """Whether the worker holds its model and was not told to end."""
        return self._ready and self._ending is None

    def detail(self) -> Mapping[str, Json]:
        """Tell which process it is."""
        return {"pid": None if self._process is None else self._process.pid}

    # -- the process ---------------------------------------------------------------------------------------

    def _spawn(self) -> socket.socket:
        """Start the process from the loop's own thread: the kernel ties the worker's life to the thread it is from."""
        with contextlib.ExitStack() as undo:
            ours, theirs = map(lifted_socket, socket.socketpair())
            undo.callback(ours.close)
            undo.callback(self._close_arenas)
            with theirs:
                for _ in range(2 * wire.ARENAS):
                    self._arenas.append(Arena.create())
                process = self._popen([theirs.fileno(), *(arena.fd for arena in self._arenas)])
            undo.callback(process.wait)
            undo.callback(process.kill)
            threading.Thread(target=self._wait, args=(process,), name=f"{self._name}-wait", daemon=True).start()
            undo.pop_all()
        self._process = process
        return ours

    def _popen(self, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
        python = [inheritance.interpreter(), *inheritance.flags(), "-m", _MODULE]
        return subprocess.Popen(  # noqa: S603  # our own interpreter and module
            [*python, str(os.getpid()), *map(str, inherited)],
            pass_fds=inherited,
            env=inheritance.environment(self._spec.runtime),
            cwd=inheritance.folder(),
            stdin=subprocess.DEVNULL,
            stdout=inheritance.stream(1),
            stderr=inheritance.stream(2),
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the process in a thread of its own: it leaves no zombie, and no signal handler is needed."""
        status = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            self._loop.call_soon_threadsafe(self._gone, status)

    def _lost(self, reason: str) -> None:
        """The socket was closed: the worker has died, or it ends as it was told to."""
        if self._status is not None:
            self._over()
        elif self._ending is None:
            self.kill(reason)

    def _gone(self, status: int) -> None:
        """The process has ended. What it answered before may still lie in the socket, and comes before its end."""
        self._status = status
        self._ending = self._ending or "it died"
        self._ready = False
        if self._transport is None or self._transport.is_closing():
            self._over()
        else:
            self._loop.call_later(_DRAIN_S, self._over)

    def _over(self) -> None:
        if self._ended.done():
            return
        self._give_up()
        self._close_arenas()
        assert self._status is not None  # it is over when the process has ended
        self._ended.set_result(f"{self._ending} ({_outcome(self._status)})")

    def _give_up(self) -> None:
        """Take no more batches, and tell whoever waits for the ones at hand."""
        self._ready = False
        if self._transport is not None:
            self._transport.close()
        sent, self._sent = self._sent, deque()
        for i, batch in enumerate(sent):
            if not batch.answer.done():
                died = WorkerDied(f"the worker that ran this is lost: {self._ending}")
                batch.answer.set_exception(died if i == 0 else NotRun())
        if not self._loaded.done():
            self._loaded.set_exception(
                LoadFailed(f"the worker was lost before it had loaded the model: {self._ending}")
            )
            self._loaded.exception()  # whoever waited for it may have gone

    def _close_arenas(self) -> None:
        for arena in self._arenas:
            arena.close()

    # -- batches -------------------------------------------------------------------------------------------

    def _batch(self, sent: _Sent, rows: Sequence[Row]) -> bytes:
        size = self._layout.size(sent.rows)
        if size > wire.MAX_BLOCK:
            raise MemoryError(f"{size} bytes for one batch; at most {wire.MAX_BLOCK} can be given")
        block = bytearray(size) if size <= wire.INLINE else self._arenas[sent.seq % wire.ARENAS].block(size)
        text = self._layout.write(rows, block)
        told: dict[str, Any] = {"block": block} if size <= wire.INLINE else {"arena": size}
        return wire.frame(wire.BATCH, text=text, seq=sent.seq, rows=sent.rows, **told)

    def _received(self, header: wire.Header, body: memoryview) -> None:
        """Take a frame from the worker. Raises ``ProtocolError`` for one that does not fit."""
        text = bytes(body[: header.text])
        if header.kind == wire.READY and not self._loaded.done():
            self._loaded.set_result(None)
        elif header.kind == wire.REFUSED and not self._loaded.done():
            self._loaded.set_exception(_error(text))
        elif self._sent and self._sent[0].seq == header.seq and header.kind in {wire.ANSWER, wire.FAILED}:
            self._answer(self._sent[0], header, text, body)
            self._sent.popleft()
        else:
            raise wire.ProtocolError(f"a frame of kind {header.kind} that nobody asked for")

    def _answer(self, sent: _Sent, header: wire.Header, text: bytes, body: memoryview) -> None:
        if sent.answer.done():
            return
        if header.kind == wire.FAILED:
            sent.answer.set_exception(_error(text))
            return
        try:
            sent.answer.set_result(unstack(self._outputs(header, text, body), sent.rows))
        except wire.ProtocolError:
            raise
        except InferenceFailed as error:
            sent.answer.set_exception(error)
        except Exception as error:  # noqa: BLE001  # no memory for it: this batch's failure, not the worker's
            sent.answer.set_exception(InferenceFailed(f"the answer could not be taken over: {describe(error)}"))

    def _outputs(self, header: wire.Header, text: bytes, body: memoryview) -> Columns:
        arena = self._arenas[wire.ARENAS + header.seq % wire.ARENAS]
        inline = header.block <= wire.INLINE
        return wire.read_outputs(text, lambda: body[header.text :] if inline else arena.read(header.block))


class _Frames(asyncio.Protocol):
    """Cuts what arrives into frames."""

    def __init__(self, received: Callable[[wire.Header, memoryview], None], lost: Callable[[str], None]) -> None:
        self._received = received
        self._lost = lost
        self._data = bytearray()
        self._header: wire.Header | None = None

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            while self._cut():
                pass
        except wire.ProtocolError as error:
            self._lost(f"it does not keep to the protocol: {error}")

    def connection_lost(self, _: Exception | None) -> None:
        self._lost("it died")

    def _cut(self) -> bool:
        """Take one frame from the front of the data, if it is all there."""
        if self._header is None and len(self._data) >= wire.HEADER_BYTES:
            self._header = wire.parse_header(self._data)
            del self._data[: wire.HEADER_BYTES]
        if self._header is None or len(self._data) < self._header.follows:
            return False
        header, self._header = self._header, None
        body = bytes(memoryview(self._data)[: header.follows])
        del self._data[: header.follows]
        self._received(header, memoryview(body))
        return True


def _error(text: bytes) -> ModelServeError:
    """Make again what a worker raised, as far as its word is taken for it."""
    known = {each.__name__: each for each in (ArtifactUnsafe, InferenceFailed, OutOfMemory)}
    try:
        name, message = json.loads(text)
    except ValueError as error:
        raise wire.ProtocolError("an error that cannot be read") from error
    return known.get(str(name), LoadFailed)(str(message))


def _outcome(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"
