"""The input example that MLflow keeps beside a model, in a form that our registry takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelserve.adapters.registries.mlflow.schema import UNNAMED
from modelserve.signature import Signature
from modelserve.types import Json


def example_of(root: Path, description: Mapping[str, Any], signature: Signature | None) -> Any:
    """Return example rows; None where there are none, or none that rows can be read from.

    It is a help, not the model: a version whose example is broken can be imported with another one.
    """
    info = description.get("saved_input_example_info")
    if not isinstance(info, dict):
        return None
    path = (root / str(info.get("artifact_path"))).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    try:
        document = json.loads(path.read_bytes())
        if info.get("params"):
            document = document["inputs"]
        return _rows(document, str(info.get("type")), signature)
    except (ValueError, LookupError, TypeError):
        return None


def _rows(document: Json, kind: str, signature: Signature | None) -> Any:
    if kind == "dataframe":
        columns = document.get("columns") if isinstance(document, dict) else None
        rows = document["data"] if isinstance(document, dict) else document
        if columns is None or _is_one_array(signature):
            return {UNNAMED: rows}
        return {str(name): [row[i] for row in rows] for i, name in enumerate(columns)}
    if kind == "ndarray":
        values = document.get("inputs", document) if isinstance(document, dict) else document
        return values if isinstance(values, dict) else {_sole_name(signature): values}
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        return document
    return None


def _is_one_array(signature: Signature | None) -> bool:
    return signature is not None and [field.name for field in signature.inputs] == [UNNAMED]


def _sole_name(signature: Signature | None) -> str:
    return signature.inputs[0].name if signature is not None and len(signature.inputs) == 1 else UNNAMED
