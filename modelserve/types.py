"""The values that travel between the rooms: frozen, without behaviour beyond reading themselves."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = Mapping[str, Array]
"""A batch: one array per named input or output, all of the same length along axis 0."""
Row: TypeAlias = tuple[Any, ...]
"""One validated request: a value per input, in the order of the signature."""
Json: TypeAlias = Any

FrameworkName = Literal["pytorch", "tensorflow", "sklearn", "onnx"]
Status = Literal["staging", "production", "archived"]

SOLE_OUTPUT = "output"
"""The name a model's single, unnamed output goes by. Its rows are answered bare, not as a mapping."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What pins a model's bytes.

    ``key`` is where they lie under the artifact root, ``sha256`` (lower-case hex) what they must hash to,
    ``size`` their number of bytes. ``format`` names the one loader that may read them.
    """

    key: str
    sha256: str
    size: int
    format: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One immutable version of a model, as the registry knows it. Only ``status`` ever changes.

    ``signature`` is the JSON form of :class:`modelserve.Signature`; ``load_options`` is what the framework
    adapter needs to load the artifact again (method, trusted types); ``example`` pins the golden example.
    """

    id: int
    model_name: str
    version: str
    framework: FrameworkName
    artifact: Artifact
    signature: Json
    load_options: Mapping[str, Json]
    example: Artifact | None
    metrics: Mapping[str, Json]
    tags: Mapping[str, str]
    status: Status
    created_at: dt.datetime


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentState:
    """What the registry wants served for one model. ``generation`` rises with every change."""

    model_name: str
    generation: int
    production: ModelVersion | None
    previous: ModelVersion | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentEvent:
    """One line of a model's history: who did what, why, and what was live afterwards."""

    model_name: str
    generation: int
    action: Literal["register", "promote", "rollback", "archive"]
    version: str
    production: str | None
    previous: str | None
    actor: str
    reason: str
    occurred_at: dt.datetime


class Prediction(NamedTuple):
    """The answer to one row.

    ``prediction`` is plain Python (numbers, strings, lists; a mapping when the model has several named
    outputs). ``latency_ms`` is the time from arrival to answer in milliseconds.
    """

    prediction: Json
    model_version: str
    latency_ms: float
    request_id: str
    cached: bool = False


def row_count(columns: Columns) -> int:
    """Return the number of rows in a batch; 0 when it has no columns."""
    return next((len(column) for column in columns.values()), 0)


def as_arrays(columns: Mapping[str, Any]) -> dict[str, Array]:
    """Return every column as an array."""
    return {name: np.asarray(column) for name, column in columns.items()}
