"""ONNX, run by ONNX Runtime: a graph of known operators."""

from modelserve.adapters.frameworks.onnx.adapter import OnnxFramework

__all__ = ["OnnxFramework"]
