"""Tell the types of files: ``python -m examples.file_types PATH...``, by the ONNX model that the package magika ships.

The model looks at the first and the last kilobyte of a file, and scores more than two hundred types.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import modelserve as ms

MODEL: Final = "file-types"
MODEL_FOLDER: Final = "models/standard_v3_3"
_BLOCK: Final = 4096  # bytes read at either end, of which so many are looked at once the white space is gone:
_SEEN: Final = 1024
_PADDING: Final = 256  # no byte has this value


def model_folder() -> Path:
    """Return the folder that holds ``model.onnx`` and its settings."""
    spec = importlib.util.find_spec("magika")  # read by path: the package's own import opens a session
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("magika is not installed; run: pip install magika")
    return Path(spec.submodule_search_locations[0]) / MODEL_FOLDER


def labels() -> list[str]:
    """Return the types in the order of the model's scores."""
    settings: dict[str, list[str]] = json.loads((model_folder() / "config.min.json").read_text(encoding="utf-8"))
    return settings["target_labels_space"]


def features(content: bytes) -> npt.NDArray[np.int32]:
    """Return what the model sees of a file: its beginning padded at the end, and its end padded at the beginning."""
    beginning = np.frombuffer(content[:_BLOCK].lstrip()[:_SEEN], np.uint8)
    end = np.frombuffer(content[-_BLOCK:].rstrip()[-_SEEN:], np.uint8)
    seen = np.full(2 * _SEEN, _PADDING, np.int32)
    seen[: len(beginning)] = beginning
    seen[len(seen) - len(end) :] = end
    return seen


def register(registry: ms.Registry, version: str = "1.0.0") -> None:
    """Register the model by the path of its file, and put it into production."""
    example = {"bytes": np.stack([features(b"print('hello')\n"), features(b'{"a": [1, 2]}')])}
    registry.register(MODEL, version, model_folder() / "model.onnx", example=example)
    registry.promote(MODEL, version)


def request_of(content: bytes) -> dict[str, Any]:
    """Return the inputs of a request about a file."""
    return {"bytes": features(content)}


def best(scores: list[float], names: list[str]) -> tuple[str, float]:
    """Return the likeliest type and its score."""
    place = int(np.argmax(scores))
    return names[place], scores[place]


def main(paths: list[str]) -> None:
    """Print the type of each file."""
    names = labels()
    with tempfile.TemporaryDirectory() as folder, ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        register(registry)
        with ms.ModelServer(registry, cache_dir=Path(folder) / "cache") as server:
            answers = server.predict_many(MODEL, [request_of(Path(path).read_bytes()) for path in paths])
    for path, answer in zip(paths, answers, strict=True):
        name, score = best(answer.prediction, names)
        print(f"{path}: {name} ({score:.0%})")


if __name__ == "__main__":
    main(sys.argv[1:])
