"""The models that the framework adapters are measured with: as they are registered, and as they are called bare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from modelserve.types import Array

HIDDEN = 1024


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, at least 64 rows for it, what a user would call, and how it is registered and allowed."""

    name: str
    model: Any
    rows: Array
    bare: Callable[[Array], Any]
    register: dict[str, Any] = dataclasses.field(default_factory=dict)
    allowed: dict[str, Any] = dataclasses.field(default_factory=dict)


def torch_mlp() -> Network:
    """Make a perceptron of 256-1024-1024-10 in PyTorch."""
    from torch import nn  # noqa: PLC0415  # a process that measures one framework imports no other

    layers = [nn.Linear(256, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)]
    return _torch("torch MLP", nn.Sequential(*layers), _vectors())


def torch_conv() -> Network:
    """Make a small convolutional net on pictures of shape (3, 224, 224) in PyTorch."""
    from torch import nn  # noqa: PLC0415  # as above

    layers = [
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ]
    return _torch("torch conv 3×224×224", nn.Sequential(*layers), _pictures())


def _torch(name: str, module: Any, rows: Array) -> Network:
    import torch  # noqa: PLC0415  # as above

    module.eval()

    def bare(batch: Array) -> Array:
        with torch.inference_mode():
            answer: Array = module(torch.from_numpy(batch)).numpy()
            return answer

    return Network(name, module, rows, bare)


def keras_mlp() -> Network:
    """Make the same perceptron in Keras; bare is its traced call, which is quicker than ``model.predict``."""
    import keras  # noqa: PLC0415  # as above
    import tensorflow as tf  # noqa: PLC0415  # as above

    layers = [keras.layers.Dense(HIDDEN, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((256,)), *layers, keras.layers.Dense(10)])
    call = tf.function(
        lambda batch: model(batch, training=False), input_signature=[tf.TensorSpec((None, 256), tf.float32)]
    )
    return Network(
        "Keras MLP", model, _vectors(), lambda batch: call(tf.constant(batch)).numpy(), allowed={"allow_code": True}
    )


def onnx_forest() -> Network:
    """Convert a random forest of 100 trees to ONNX, as a file from elsewhere would come."""
    import onnxruntime  # noqa: PLC0415  # as above
    from skl2onnx import to_onnx  # noqa: PLC0415  # as above

    x, y = _cancer()
    x = x.astype("float32")
    graph = to_onnx(_forest(100, x, y), x[:1], options={"zipmap": False})
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Network("ONNX forest of 100", graph, x, lambda batch: session.run(None, {"X": batch}))


def logistic() -> Network:
    """Fit a scaler and a logistic regression over 30 features."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # as above
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415  # as above
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415  # as above

    x, y = _cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    return Network("scaler + logistic", model, x, model.predict)


def boosting() -> Network:
    """Fit histogram gradient boosting of 100 trees."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415  # as above

    x, y = _cancer()
    model = HistGradientBoostingClassifier(random_state=0).fit(x, y)
    return Network("HistGradientBoosting(100)", model, x, model.predict)


def sklearn_forest(**register: Any) -> Network:
    """Fit a random forest of 200 trees; ``optimize="onnx"`` is for the caller to ask."""
    x, y = _cancer()
    model = _forest(200, x, y)
    return Network("forest of 200", model, x, model.predict, register)


def _forest(trees: int, x: Array, y: Array) -> Any:
    from sklearn.ensemble import RandomForestClassifier  # noqa: PLC0415  # as above

    return RandomForestClassifier(trees, random_state=0).fit(x, y)


def _cancer() -> tuple[Array, Array]:
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  # as above

    x, y = load_breast_cancer(return_X_y=True)
    return x, y


def _vectors() -> Array:
    return np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)


def _pictures() -> Array:
    return np.random.default_rng(0).standard_normal((64, 3, 224, 224), dtype=np.float32)
