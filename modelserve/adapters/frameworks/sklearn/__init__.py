"""scikit-learn, and what follows its interface: XGBoost and LightGBM. One file per format."""

from modelserve.adapters.frameworks.sklearn.adapter import SklearnFramework

__all__ = ["SklearnFramework"]
