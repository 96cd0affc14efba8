"""Who imports which framework: only who runs its models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelserve as ms
from modelserve import plugins
from modelserve.errors import MissingDependency
from modelserve.types import Runtime

PACKAGES = ("sklearn", "torch", "tensorflow", "keras", "onnxruntime", "onnx", "xgboost", "lightgbm", "pandas")
X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")

IMPORT_ALL = f"""
import sys, modelserve
for name in modelserve.__all__:
    getattr(modelserve, name)
print(sorted(set({PACKAGES}) & sys.modules.keys()))
"""

SERVE = f"""
import sys
from pathlib import Path
import modelserve as ms

if __name__ == "__main__":
    options = ms.ModelOptions(executor="process", allow_code=True, timeout_ms=30_000)
    with ms.ModelServer(ms.Registry(sys.argv[1]), {{"m": options}}, cache_dir=sys.argv[2]) as server:
        server.predict("m", {{"x": [0.5, 1.5, 2.5]}})
        pid = server.status()[0].pool.replicas[0].detail["pid"]
        mapped = Path(f"/proc/{{pid}}/maps")
        print(sorted(set({PACKAGES}) & sys.modules.keys()))
        print(mapped.read_text() if mapped.exists() else "")
"""


def _sklearn() -> Any:
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415  # each test imports what it is about

    return LinearRegression().fit(X, X[:, 0])


def _torch() -> Any:
    from torch import nn  # noqa: PLC0415  # as above

    return nn.Linear(3, 1)


def _keras() -> Any:
    import keras  # noqa: PLC0415  # as above

    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def _onnx() -> Any:
    from onnx import TensorProto, helper  # noqa: PLC0415  # as above

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _xgboost() -> Any:
    from xgboost import XGBRegressor  # noqa: PLC0415  # as above

    return XGBRegressor(n_estimators=2).fit(X, X[:, 0])


def _lightgbm() -> Any:
    from lightgbm import LGBMRegressor  # noqa: PLC0415  # as above

    return LGBMRegressor(n_estimators=2, verbose=-1, min_child_samples=1).fit(X, X[:, 0])


def test_importing_modelserve_imports_no_framework() -> None:
    """Neither the package nor any of its public names brings a framework, or pandas, into the host."""
    assert _run("-c", IMPORT_ALL) == ["[]"]


@pytest.mark.slow
@pytest.mark.timeout(120)  # imports a framework twice
@pytest.mark.parametrize(
    ("make", "allowed"),
    [(_sklearn, {"sklearn"}), (_torch, {"torch"}), (_keras, {"tensorflow"}), (_onnx, {"onnxruntime"})],
)
def test_a_worker_imports_its_own_framework_and_the_host_none(make: Any, allowed: set[str], tmp_path: Path) -> None:
    """With process replicas the host stays free of frameworks, and a worker loads the libraries of one alone."""
    url = f"sqlite:///{tmp_path}/models.db"
    with ms.Registry(url) as registry:
        registry.register("m", "1", make(), example=X)
        registry.promote("m", "1")
    script = tmp_path / "serve.py"
    script.write_text(SERVE, encoding="utf-8")

    in_the_host, *mapped = _run(str(script), url, str(tmp_path / "cache"))

    assert in_the_host == "[]"
    if sys.platform == "linux":
        loaded = {name for name in PACKAGES if any(f"/site-packages/{name}/" in line for line in mapped)}
        assert loaded & {"sklearn", "torch", "tensorflow", "onnxruntime", "xgboost", "lightgbm"} == allowed


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (_sklearn, "skops", "sklearn"),
        (_torch, "torch", "torch"),
        (_keras, "keras", "tensorflow"),
        (_onnx, "onnxruntime", "onnx"),
        (_xgboost, "xgboost", "xgboost"),
        (_lightgbm, "lightgbm", "lightgbm"),
    ],
)
def test_a_missing_framework_answers_with_its_install_line(
    make: Any, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a version is loaded without its framework, the error is the line that installs it."""
    model = make()
    framework = plugins.framework(plugins.framework_of(model))
    saved = framework.save(model, tmp_path, {"method": "predict"}, {"x": X})
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=rf"pip install 'modelserve\[{extra}\]'"):
        framework.load(saved.path, saved.format, saved.load_options, Runtime(allow_code=True))


def _run(*arguments: str) -> list[str]:
    """Run a program in a fresh interpreter; return the lines it printed."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
