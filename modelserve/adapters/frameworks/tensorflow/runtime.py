"""The framework itself: imported when it is first needed, and where in the machine it runs."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import InvalidInput, LoadFailed

_WORKER: Final = "modelserve.execution.worker"


def tensorflow() -> Any:
    """Return the module ``tensorflow``."""
    # It brings Keras, which has wrappers for scikit-learn and imports that for them. A worker needs none; a host may.
    return plugins.require("tensorflow", hiding=("sklearn",) if _in_a_worker() else ())


def keras() -> Any:
    """Return the module ``keras``. Raises ``InvalidInput`` when it computes with another framework than TensorFlow."""
    tensorflow()
    module = plugins.require("keras")
    backend = module.backend.backend()
    if backend != "tensorflow":
        problem = f"Keras computes with {backend!r} in this process; set KERAS_BACKEND=tensorflow before it is imported"
        raise InvalidInput("model", problem)
    return module


def _in_a_worker() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == _WORKER


def device_name(device: str) -> str:
    """Return what TensorFlow calls a device of :class:`modelserve.types.Runtime`. Raises ``LoadFailed`` for none."""
    kind, _, number = device.partition(":")
    if kind not in {"cpu", "cuda"}:
        raise LoadFailed(f"TensorFlow runs on 'cpu' and 'cuda', not on {device!r}; change ModelOptions(device=)")
    gpus = tensorflow().config.list_physical_devices("GPU")
    _take_memory_by_need(gpus)
    if kind == "cpu":
        return "/CPU:0"
    index = int(number or 0)
    if index >= len(gpus):
        raise LoadFailed(f"there is no device {device!r} here: TensorFlow sees {len(gpus)} GPUs")
    return f"/GPU:{index}"


def _take_memory_by_need(gpus: list[Any]) -> None:
    """Keep TensorFlow from taking all memory of every GPU, as it does at the first operation wherever that runs."""
    for gpu in gpus:
        with contextlib.suppress(RuntimeError):  # it has begun already, and goes on as it is
            tensorflow().config.experimental.set_memory_growth(gpu, True)  # noqa: FBT003  # takes no keyword
