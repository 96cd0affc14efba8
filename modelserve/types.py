"""The values that travel between the rooms: frozen, without behaviour beyond reading themselves."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = Mapping[str, Array]
"""A batch: one array per named input or output, all of the same length along axis 0."""
Row: TypeAlias = tuple[Any, ...]
"""One validated request: a value per input, in the order of the signature."""
Json: TypeAlias = Any

FrameworkName: TypeAlias = str
"""``"pytorch"``, ``"tensorflow"``, ``"sklearn"``, ``"onnx"``, or what a third party's adapter is called."""
Status = Literal["staging", "production", "archived"]
Role: TypeAlias = Literal["production", "canary", "shadow"]
"""What a version is loaded for: to answer, to answer a part of the requests, or to run without being waited for."""
Arm: TypeAlias = Literal["production", "canary", "pinned", "shadow"]
"""Why a version ran for a request: by its role, or because the request named it."""

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
class Runtime:
    """How and where a model may be loaded by whoever loads it, whatever its registered row says.

    ``allow_pickle`` admits artifacts that are pickles, ``allow_code`` formats that hold a program of their own
    (SavedModel, Keras), and ``factories`` the callables (``"package.module:callable"``) that may build a network for
    registered weights. ``device`` is where it runs: ``cpu``, ``cuda:0``, ``mps``. ``threads`` bounds the threads of one
    batch where a framework lets each model have a limit of its own (None: the framework's choice). ``compile`` asks for
    the framework's compiler. ``sha256`` is what an artifact of one file must hash to: a reader that takes all of its
    bytes at once gets them from :func:`modelserve.contents.contents`, which sees to it.
    """

    allow_pickle: bool = False
    allow_code: bool = False
    factories: Sequence[str] = ()
    device: str = "cpu"
    threads: int | None = None
    compile: bool = False
    sha256: str | None = None


SAFE: Final = Runtime()
"""Nothing that could run code of its own is loaded, and all of it on the CPU."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One immutable version of a model, as the registry knows it. Only ``status`` and ``attestation`` ever change.

    ``signature`` is the JSON form of :class:`modelserve.Signature`; ``load_options`` is what the framework
    adapter needs to load the artifact again (method, trusted types); ``example`` pins the golden example.
    ``conversion`` says how a model that was converted at registration compares with the original; None for others.
    ``attestation`` holds the signatures of it, a line each; None while nobody has signed it.
    """

    id: int
    model_name: str
    version: str
    framework: FrameworkName
    artifact: Artifact
    signature: Json
    load_options: Mapping[str, Json]
    example: Artifact | None
    conversion: Mapping[str, Json] | None
    metrics: Mapping[str, Json]
    tags: Mapping[str, str]
    status: Status
    created_at: dt.datetime
    attestation: str | None = None


class Pointer(NamedTuple):
    """Where one model stands in the registry, without what it takes to serve it. It changes whenever that does."""

    generation: int
    production_id: int | None


class VersionSummary(NamedTuple):
    """What a list of versions shows of one."""

    version: str
    status: Status
    framework: FrameworkName
    metrics: Mapping[str, Json]
    created_at: dt.datetime


class VersionPage(NamedTuple):
    """Some versions of a model, newest first. There are older ones if ``next`` names the last of these."""

    versions: tuple[VersionSummary, ...]
    next: str | None


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
    action: Literal["register", "promote", "rollback", "archive", "sign"]
    version: str
    production: str | None
    previous: str | None
    actor: str
    reason: str
    occurred_at: dt.datetime


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """When a pool grows and shrinks by one replica, between its smallest and its largest number.

    It grows when on average more than ``out_above`` rows waited over the last ``out_after_s`` seconds, shrinks when
    never as many as ``in_below`` did over the last ``in_after_s``, and then leaves it at that for ``cooldown_s``.
    """

    out_above: float = 50.0
    out_after_s: float = 2.0
    in_below: float = 5.0
    in_after_s: float = 180.0
    cooldown_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.in_below < self.out_above:
            raise ValueError("in_below must be at least 0 and lower than out_above, or the pool would never rest")
        if min(self.out_after_s, self.in_after_s, self.cooldown_s) < 0.0:
            raise ValueError("a number of seconds cannot be negative")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """What a batcher did since it was made.

    ``sizes`` counts batches by their number of rows, rounded up to a power of two. ``reasons`` counts them by why they
    left: ``full``, ``idle`` (a runner was free) or ``staged`` (to follow the batch that runs). ``refused`` counts
    calls by why: ``full`` (the queue) or ``late`` (their deadline). ``max_rows`` is the batch size in force; a batch
    of n rows is expected to take ``fixed_s + n * per_row_s`` seconds (None until two sizes were seen).
    """

    batches: int
    sizes: Mapping[int, int]
    reasons: Mapping[str, int]
    refused: Mapping[str, int]
    quarantined: int
    max_rows: int
    fixed_s: float | None
    per_row_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One place in a pool: ``state`` is starting, ready, hung, waiting (for its next start) or leaving.

    ``detail`` is what the replica tells of itself: its process, the batches that it ran in place.
    """

    state: str
    restarts: int
    detail: Mapping[str, Json]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """Where the pool of one version stands. ``circuit_open``: its workers keep dying, restarts are rare now."""

    replicas: tuple[ReplicaStatus, ...]
    smallest: int
    largest: int
    queue_depth: int
    circuit_open: bool
    restarts: int
    scaled_out: int
    scaled_in: int
    batches: BatchStats


class Prediction(NamedTuple):
    """The answer to one row.

    ``prediction`` is plain Python (numbers, strings, lists; a mapping when the model has several named
    outputs). ``latency_ms`` is the time from arrival to answer in milliseconds. ``degraded`` names the features
    that the feature store did not give, and that have their default instead.
    """

    prediction: Json
    model_version: str
    latency_ms: float
    request_id: str
    cached: bool = False
    degraded: tuple[str, ...] = ()


class LogRecord(NamedTuple):
    """One row of the inference log: one answer, or one failure. Its fields are the columns of the table, in order.

    ``id`` is a UUID of version 7. ``row_index`` is the place of the row in its request. ``input_hash`` is SHA-256 or,
    with a key, HMAC-SHA-256 in lower-case hex, and None for a request that did not fit the signature. ``inputs`` and
    ``prediction`` are JSON texts; None where they are not kept. ``degraded`` is a JSON list of the features that have
    their default; None when there are none. ``latency_ms`` is that of the whole request, in milliseconds, and
    ``occurred_at`` the moment of the answer, aware.
    """

    id: str
    request_id: str
    row_index: int
    model_name: str
    version: str
    input_hash: str | None
    inputs: str | None
    prediction: str | None
    error: str | None
    latency_ms: float
    cached: bool
    degraded: str | None
    shadow: bool
    occurred_at: dt.datetime


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogStatus:
    """What became of the rows that this process sampled for the inference log.

    Each was ``written``, ``dropped`` (there was no room while the database did not take any, or no time at the end) or
    ``refused`` (the database cannot hold it), or is ``waiting``. ``problem`` says why nothing is written now.
    """

    sampled: int
    written: int
    dropped: int
    refused: int
    waiting: int
    problem: str | None


def row_count(columns: Columns) -> int:
    """Return the number of rows in a batch; 0 when it has no columns."""
    return next((len(column) for column in columns.values()), 0)


def as_arrays(columns: Mapping[str, Any]) -> dict[str, Array]:
    """Return every column as an array."""
    return {name: np.asarray(column) for name, column in columns.items()}
