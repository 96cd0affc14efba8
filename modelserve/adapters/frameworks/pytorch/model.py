"""A network behind the batch contract: columns in, columns out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.calls import Callee, arguments, arranged, choose
from modelserve.adapters.frameworks.pytorch.devices import device_of
from modelserve.adapters.frameworks.pytorch.halving import Halving
from modelserve.adapters.frameworks.pytorch.tensors import Tensors, named, refuse_strings
from modelserve.errors import InferenceFailed
from modelserve.signature import columns_of
from modelserve.types import Array, Columns


class PyTorchModel:
    """A network behind the batch contract, on the device where its weights are.

    ``call`` is the way that :func:`choose` chose at registration; None chooses it for each batch. A ``live`` module
    belongs to the user: it is put into eval mode for the time of a batch only.

    How many threads a batch takes is not set here. ``torch.set_num_threads`` holds for the whole process, which is the
    host's when the model runs in a thread of it; a worker process has been told by ``OMP_NUM_THREADS`` before it began.
    """

    def __init__(self, callee: Callee, call: str | None, *, live: bool = False) -> None:
        torch = plugins.require("torch")
        self._callee = callee
        self._call = call
        self._live = live
        device = device_in_use(callee.module)
        self._device = device_of(device)
        free = torch.cuda.empty_cache if device.type == "cuda" else _nothing
        self._infer = Halving(self._run, torch.OutOfMemoryError, free)

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch of columns, each of shape ``(rows, ...)``."""
        return self._infer(columns)

    def answer_as_given(self, example: Any) -> dict[str, Array]:
        """Answer tensors of the example's own types and order."""
        return self._run(columns_of(example))

    def _run(self, columns: Columns) -> dict[str, Array]:
        refuse_strings(columns)
        call = self._call or choose(self._callee.signature, columns)
        mode = evaluating(self._callee.module) if self._live else contextlib.nullcontext()

        def function(tensors: Tensors) -> Tensors:
            args, kwargs = arguments(call, tensors)
            return named(self._callee.function(*args, **kwargs))

        with mode, plugins.require("torch").inference_mode():
            return self._device.run(function, arranged(call, columns))


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put a module into eval mode for a while, and each part of it back into the mode it was in."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def device_in_use(module: Any) -> Any:
    """Return the device of a module's weights; the CPU where it has none. Raises ``InferenceFailed`` for several."""
    devices = {tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors}
    if len(devices) > 1:
        raise InferenceFailed(f"the model is spread over {', '.join(sorted(map(str, devices)))}; move it to one device")
    return devices.pop() if devices else plugins.require("torch").device("cpu")


def _nothing() -> None:
    pass
