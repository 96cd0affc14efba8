"""Where a network runs: finding the device, and carrying arrays to it and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.cuda import Cuda
from modelserve.adapters.frameworks.pytorch.tensors import Tensors, array_of, tensor_of
from modelserve.errors import LoadFailed
from modelserve.types import Array

Function: TypeAlias = Callable[[Tensors], Tensors]
"""Named tensors on the device to named tensors on the device."""


class Device(Protocol):
    """Runs a function of tensors on arrays."""

    def run(self, function: Function, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Carry the arrays to the device, call the function, and bring back what it returns."""
        ...


class Direct:
    """The CPU, which computes on the arrays as they lie, and Apple's MPS, which orders its copies by itself."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def run(self, function: Function, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Call the function on the arrays; what comes back shares no memory with them or with the network."""
        tensors = {name: tensor_of(array).to(self._device) for name, array in arrays.items()}
        return {name: array_of(tensor) for name, tensor in function(tensors).items()}


def device_of(device: Any) -> Device:
    """Return what carries to a ``torch.device``."""
    return Cuda(device) if device.type == "cuda" else Direct(device)


def find_device(name: str) -> Any:
    """Return the ``torch.device`` called ``cpu``, ``cuda``, ``cuda:1`` or ``mps``. Raises ``LoadFailed`` without it."""
    torch = plugins.require("torch")
    kind, _, index = name.partition(":")
    if kind == "cuda":
        _require_gpu(name, int(index or 0))
        return torch.device("cuda", int(index)) if index else torch.device("cuda", torch.cuda.current_device())
    if kind == "mps" and not torch.backends.mps.is_available():
        raise LoadFailed("device 'mps' needs a Mac with an Apple GPU; leave out ModelOptions(device=)")
    if kind not in {"cpu", "mps"}:
        raise LoadFailed(f"PyTorch runs on 'cpu', 'cuda', 'cuda:N' or 'mps', not on {name!r}")
    return torch.device(kind)


def _require_gpu(name: str, index: int) -> None:
    torch = plugins.require("torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise LoadFailed(
            f"device {name!r} is not there: this PyTorch finds no CUDA GPU; install a CUDA build of torch and the "
            "driver, or leave out ModelOptions(device=)"
        )
    if index >= count:
        raise LoadFailed(f"device {name!r} is not there: the GPUs are numbered from 0 to {count - 1}")
