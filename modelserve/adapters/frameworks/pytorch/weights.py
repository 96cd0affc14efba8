"""The formats ``safetensors`` and ``state_dict``: weights alone. A function of the user's builds the network for them.

Weights are data. The function is code, but code of the place that serves: it is named in the version's row, and called
only where the options of the model name it too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.archives import read_archive
from modelserve.adapters.frameworks.pytorch.calls import Callee
from modelserve.adapters.frameworks.pytorch.devices import find_device
from modelserve.adapters.frameworks.pytorch.safety import load_restricted
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.types import Columns, Json, Runtime

_SHOWN = 5


class SafeTensors:
    """Weights in the format of the safetensors library: a JSON header and raw numbers."""

    name = "safetensors"
    suffixes: tuple[str, ...] = (".safetensors",)

    def write(self, model: Any, path: Path, call: str | None, example: Columns | None) -> None:  # noqa: ARG002
        """Write the weights of a module; of tensors that share their memory, one."""
        _require_module(model)
        safetensors = plugins.require("safetensors.torch")
        try:
            safetensors.save_model(on_cpu(model), str(path))
        except Exception as error:
            raise InvalidInput("model", f"safetensors cannot save it: {error}; use format='state_dict'") from error

    def read(self, path: Path, load_options: Mapping[str, Json], runtime: Runtime) -> Callee:
        """Read the weights into a network that the factory builds."""
        return _restored(self._weights, path, load_options, runtime)

    @staticmethod
    def _weights(path: Path, _: str | None) -> Any:
        # Mapped, not read: weights can be as large as the memory. They are numbers alone, and copied into the network.
        safetensors = plugins.require("safetensors.torch")
        try:
            return safetensors.load_file(path)
        except Exception as error:
            raise LoadFailed(f"safetensors cannot read the artifact: {error}") from error


class StateDict:
    """Weights as ``torch.save`` writes a state dict, read by PyTorch's restricted unpickler."""

    name = "state_dict"
    suffixes: tuple[str, ...] = (".pt", ".pth")

    def write(self, model: Any, path: Path, call: str | None, example: Columns | None) -> None:  # noqa: ARG002
        """Write the state dict of a module."""
        _require_module(model)
        plugins.require("torch").save(on_cpu(model).state_dict(), path)

    def read(self, path: Path, load_options: Mapping[str, Json], runtime: Runtime) -> Callee:
        """Read the weights into a network that the factory builds."""
        return _restored(self._weights, path, load_options, runtime)

    @staticmethod
    def _weights(path: Path, sha256: str | None) -> Any:
        torch = plugins.require("torch")
        state = load_restricted(read_archive(path, sha256)[0], "the artifact")
        if not isinstance(state, Mapping) or not all(isinstance(each, torch.Tensor) for each in state.values()):
            raise LoadFailed(
                "the artifact holds more than weights, or something else; save only the state dict: "
                "torch.save(model.state_dict(), path)"
            )
        return state


def on_cpu(module: Any) -> Any:
    """Return the module, or a copy of it on the CPU when it is somewhere else."""
    tensors = [*module.parameters(), *module.buffers()]
    return module if all(tensor.device.type == "cpu" for tensor in tensors) else copy.deepcopy(module).cpu()


def _require_module(model: Any) -> None:
    if not isinstance(model, plugins.require("torch").nn.Module):
        raise InvalidInput("format", f"only a module is saved as weights, not a {type(model).__name__}; leave it out")


def _restored(weights_of: Any, path: Path, load_options: Mapping[str, Json], runtime: Runtime) -> Callee:
    device = find_device(runtime.device)
    factory = _permitted(load_options.get("factory"), runtime)
    weights = weights_of(path, runtime.sha256)
    network = _built(factory)
    _fill(network, weights, factory)
    try:
        return Callee.of_module(network.eval().to(device))
    except RuntimeError as error:
        raise LoadFailed(f"the network cannot be moved to {device}: {error}") from error


def _permitted(factory: Json, runtime: Runtime) -> str:
    if not isinstance(factory, str):
        raise LoadFailed("nothing says who builds the network for these weights; register them with factory=")
    if factory not in runtime.factories:
        raise ArtifactUnsafe(
            f"the artifact is weights, and {factory!r} builds the network for them: calling it runs code, so it is "
            f"refused by default; if you trust it, serve the model with ModelOptions(factories=({factory!r},))"
        )
    return factory


def _built(factory: str) -> Any:
    try:
        network = plugins.resolve(factory)()
    except Exception as error:
        raise LoadFailed(
            f"the factory {factory!r} does not build a network: {type(error).__name__}: {error}; it must be importable "
            "where the model is loaded, and take no arguments"
        ) from error
    if not isinstance(network, plugins.require("torch").nn.Module):
        raise LoadFailed(f"the factory {factory!r} returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def _fill(network: Any, weights: Mapping[str, Any], factory: str) -> None:
    wanted = network.state_dict()
    for name in wanted.keys() & weights.keys():
        if wanted[name].dtype != weights[name].dtype:
            kinds = f"{weights[name].dtype} in the artifact and {wanted[name].dtype} in the network"
            raise LoadFailed(f"the weight {name!r} is {kinds}; let the factory {factory!r} build that type")
    _refuse_difference("are not in the artifact", _absent(wanted, weights), factory)
    _refuse_difference("are not in the network", weights.keys() - wanted.keys(), factory)
    try:
        network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise LoadFailed(f"the weights do not fit what {factory!r} builds: {reason}") from error


def _absent(wanted: Mapping[str, Any], weights: Mapping[str, Any]) -> set[str]:
    """Return the weights that are missing: neither there, nor another name for one that is."""
    given = {_place(wanted[name]) for name in wanted.keys() & weights.keys()}
    return {name for name in wanted.keys() - weights.keys() if _place(wanted[name]) not in given}


def _place(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _refuse_difference(what: str, names: set[str], factory: str) -> None:
    if names:
        shown = ", ".join(map(repr, sorted(names)[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
        raise LoadFailed(f"the network that {factory!r} builds is another one: {len(names)} weights {what}: {shown}")
