"""scikit-learn to ONNX, and with it XGBoost and LightGBM."""

from modelserve.adapters.converters.sklearn_to_onnx.converter import SklearnToOnnx

__all__ = ["SklearnToOnnx"]
