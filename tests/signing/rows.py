"""A row of the registry, and what can be changed in it after it was signed."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable

from modelserve.types import Artifact, ModelVersion

ARTIFACT = Artifact(key="blobs/sha256/" + "a" * 64, sha256="a" * 64, size=10, format="skops")
EXAMPLE = Artifact(key="blobs/sha256/" + "b" * 64, sha256="b" * 64, size=20, format="example-json")
VERSION = ModelVersion(
    id=1,
    model_name="churn",
    version="1.4.2",
    framework="sklearn",
    artifact=ARTIFACT,
    signature={"inputs": [{"name": "x", "dtype": "float64", "shape": [2], "nullable": False}]},
    load_options={"method": "predict", "trusted": ["acme.LogRatio"]},
    example=EXAMPLE,
    conversion=None,
    metrics={"auc": 0.9},
    tags={"team": "growth"},
    status="staging",
    created_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
)


CHANGES: dict[str, Callable[[ModelVersion], ModelVersion]] = {
    "model_name": lambda v: dataclasses.replace(v, model_name="fraud"),
    "version": lambda v: dataclasses.replace(v, version="1.4.3"),
    "framework": lambda v: dataclasses.replace(v, framework="onnx"),
    "key": lambda v: dataclasses.replace(v, artifact=dataclasses.replace(v.artifact, key=EXAMPLE.key)),
    "sha256": lambda v: dataclasses.replace(v, artifact=dataclasses.replace(v.artifact, sha256="c" * 64)),
    "size": lambda v: dataclasses.replace(v, artifact=dataclasses.replace(v.artifact, size=11)),
    "format": lambda v: dataclasses.replace(v, artifact=dataclasses.replace(v.artifact, format="joblib")),
    "signature": lambda v: dataclasses.replace(v, signature={"inputs": [*v.signature["inputs"], {"name": "y"}]}),
    "method": lambda v: dataclasses.replace(v, load_options={**v.load_options, "method": "predict_proba"}),
    "trusted": lambda v: dataclasses.replace(v, load_options={**v.load_options, "trusted": ["os.system"]}),
    "load_options": lambda v: dataclasses.replace(v, load_options={}),
    "example": lambda v: dataclasses.replace(v, example=None),
    "example sha256": lambda v: dataclasses.replace(v, example=dataclasses.replace(EXAMPLE, sha256="d" * 64)),
    "example key": lambda v: dataclasses.replace(v, example=dataclasses.replace(EXAMPLE, key=ARTIFACT.key)),
    "example size": lambda v: dataclasses.replace(v, example=dataclasses.replace(EXAMPLE, size=21)),
}
