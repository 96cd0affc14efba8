"""A CUDA GPU: one stream per network, and copies through pinned memory that the GPU makes by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.tensors import Tensors, array_of, plain, tensor_of
from modelserve.types import Array


class Cuda:
    """Runs functions on one GPU, in a stream of their own, so that two networks do not wait for each other."""

    def __init__(self, device: Any) -> None:
        torch = plugins.require("torch")
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # The network was copied in the stream that was current then; ours must not overtake that copy.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def run(self, function: Callable[[Tensors], Tensors], arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Queue copy, call and copy back in the stream, then wait for that stream alone."""
        torch = plugins.require("torch")
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # Held until the stream is done: pinned memory that is let go of may be given to the next copy.
            staged = {name: tensor_of(array).pin_memory() for name, array in arrays.items()}
            sent = {name: tensor.to(self._device, non_blocking=True) for name, tensor in staged.items()}
            received = {name: _received(tensor) for name, tensor in function(sent).items()}
            done = torch.cuda.Event()
            done.record(self._stream)
            done.synchronize()
        return {name: array_of(tensor) for name, tensor in received.items()}


def _received(tensor: Any) -> Any:
    """Begin to copy a tensor into pinned memory."""
    torch = plugins.require("torch")
    tensor = plain(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
