"""The MLflow adapter: versions of its model registry, read and mapped. Nothing is ever written to it."""

from modelserve.adapters.registries.mlflow.source import MlflowSource

__all__ = ["MlflowSource"]
