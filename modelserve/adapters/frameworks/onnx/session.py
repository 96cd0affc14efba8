"""A session of ONNX Runtime: where it runs, and on how many threads."""

from __future__ import annotations

from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.frameworks.onnx.graph import first_line
from modelserve.errors import LoadFailed
from modelserve.types import Runtime

_FATAL: Final = 4  # what goes wrong short of that comes as an exception, and need not be printed too
_CUDA: Final = "CUDAExecutionProvider"


def open_session(data: bytes, runtime: Runtime) -> Any:
    """Return a session for a graph. Raises ``LoadFailed`` when it does not load, or not on that device."""
    ort = plugins.require("onnxruntime")
    providers = _providers(runtime.device, ort.get_available_providers())
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = runtime.threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave the cores alone
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never by a guess at the bytes
    try:
        session = ort.InferenceSession(data, options, providers=providers)
    except Exception as error:
        raise LoadFailed(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
    if runtime.device != "cpu" and _CUDA not in session.get_providers():
        raise LoadFailed(f"ONNX Runtime could not use {runtime.device!r}: is there a GPU with its CUDA libraries?")
    return session


def _providers(device: str, available: list[str]) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    kind, _, number = device.partition(":")
    if kind != "cuda":
        raise LoadFailed(f"ONNX models run on 'cpu' and 'cuda', not on {device!r}; see ModelOptions(device=)")
    if _CUDA not in available:
        raise LoadFailed(f"this ONNX Runtime has no CUDA, so not {device!r}: install onnxruntime-gpu for onnxruntime")
    return [(_CUDA, {"device_id": int(number or 0)}), "CPUExecutionProvider"]  # the CPU for what has no CUDA kernel
