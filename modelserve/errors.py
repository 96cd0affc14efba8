"""Every error modelserve raises, in one tree.

::

    ModelServeError
    ├── InvalidInput             a value does not fit: names the field and the fix
    ├── NotFound
    │   ├── ModelNotFound
    │   ├── VersionNotFound
    │   └── JobNotFound
    ├── Conflict
    │   ├── VersionExists
    │   └── InvalidTransition
    ├── Unavailable              retryable
    │   ├── Overloaded           carries ``retry_after``
    │   ├── NotReady
    │   │   └── NotRunning       the server itself: not started, starting, closing, closed
    │   └── BackendUnavailable
    ├── DeadlineExceeded         retryable
    ├── ExecutionError
    │   ├── InferenceFailed
    │   │   └── OutOfMemory      retryable
    │   └── WorkerDied           retryable
    ├── LoadError                a version cannot be taken into service
    │   ├── ArtifactCorrupt
    │   ├── ArtifactUnsafe
    │   └── LoadFailed
    │       └── TooLittleMemory
    ├── ConfigError
    │   └── SchemaOutdated
    ├── MissingDependency        also an ImportError
    ├── ForkedServer
    └── LeaseLost

Messages are built here from the data the exception carries, so that a caller can read the data and a
human the sentence. ``retryable`` says whether the same call may succeed later without a change. How an
error looks over HTTP is decided in :mod:`modelserve.http` alone.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

NotRunningState: TypeAlias = Literal["not started", "starting", "closing", "closed"]
_NOT_RUNNING: Final[dict[NotRunningState, str]] = {
    "not started": "the server was not started: enter it (async with server), or await server.start(), in the lifespan "
    "of the host application; a ModelServer is entered by with, or started by start()",
    "starting": "the server is starting",
    "closing": "the server is closing",
    "closed": "the server was closed; it answers again after another start()",
}


class ModelServeError(Exception):
    """The root: ``except ModelServeError`` catches everything this library raises on purpose."""

    retryable: bool = False


class InvalidInput(ModelServeError):
    """A value from the caller does not fit. ``field`` names where, ``problem`` says what and the fix."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem

    def within(self, parent: str) -> InvalidInput:
        """Return the same complaint seen from one level up: ``x`` in ``instances[3]``."""
        return InvalidInput(".".join(filter(None, (parent, self.field))), self.problem)


class NotFound(ModelServeError):
    """The thing named does not exist."""


class ModelNotFound(NotFound):
    """No model of that name is registered, or it is not served here."""

    def __init__(self, model_name: str) -> None:
        super().__init__(f"no model named {model_name!r}")
        self.model_name = model_name


class VersionNotFound(NotFound):
    """The model has no such version, or that version is not loaded here."""

    def __init__(self, model_name: str, version: str | None) -> None:
        what = "production version" if version is None else f"version {version!r}"
        super().__init__(f"model {model_name!r} has no {what}")
        self.model_name = model_name
        self.version = version


class JobNotFound(NotFound):
    """No batch job has that id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no batch job {job_id!r}")
        self.job_id = job_id


class Conflict(ModelServeError):
    """The request is well-formed but does not fit the present state."""


class VersionExists(Conflict):
    """Versions are immutable: a name and version can be registered once."""

    def __init__(self, model_name: str, version: str) -> None:
        super().__init__(
            f"model {model_name!r} already has a version {version!r}; versions are immutable, "
            "register the new artifact under a new one"
        )
        self.model_name = model_name
        self.version = version


class InvalidTransition(Conflict):
    """The registry does not allow this change of status."""

    def __init__(self, model_name: str, version: str | None, problem: str) -> None:
        subject = model_name if version is None else f"{model_name} {version}"
        super().__init__(f"{subject}: {problem}")
        self.model_name = model_name
        self.version = version
        self.problem = problem


class Unavailable(ModelServeError):
    """It cannot be done now; the same call may succeed later."""

    retryable = True


class Overloaded(Unavailable):
    """The queue is full, or the deadline cannot be met. Try again after ``retry_after`` seconds.

    None says that waiting does not help: the model needs longer for the request than its time limit, even alone.
    """

    def __init__(self, problem: str, retry_after: float | None) -> None:
        super().__init__(problem if retry_after is None else f"{problem}; try again in {retry_after:.3g} s")
        self.retry_after = retry_after
        self.retryable = retry_after is not None


class NotReady(Unavailable):
    """No version is loaded yet, or the server is closing."""


class NotRunning(NotReady):
    """The server itself does not answer. ``state`` says why: it was not started, is starting, is closing, is closed."""

    def __init__(self, state: NotRunningState) -> None:
        super().__init__(_NOT_RUNNING[state])
        self.state = state


class BackendUnavailable(Unavailable):
    """A database, object store, cache or feature store did not answer. ``backend`` names it; the cause is chained."""

    def __init__(self, backend: str, problem: str) -> None:
        super().__init__(f"{backend} is unavailable: {problem}")
        self.backend = backend


class DeadlineExceeded(ModelServeError):
    """The request was not answered within its time limit (``timeout_s`` seconds).

    ``needed_s`` is what the model takes for it at least; if that is more than the limit, no retry helps.
    """

    retryable = True

    def __init__(self, timeout_s: float, needed_s: float = 0.0) -> None:
        late = f"not answered within {timeout_s * 1000:.0f} ms"
        if needed_s > timeout_s:
            late += f": the model takes about {needed_s:.3g} s for this alone; raise timeout_ms"
            self.retryable = False
        super().__init__(late)
        self.timeout_s = timeout_s
        self.needed_s = needed_s


class ExecutionError(ModelServeError):
    """The model ran, or was about to, and gave no result."""


class InferenceFailed(ExecutionError):
    """The model raised on this row, or broke the contract of one output row per input row."""


class OutOfMemory(InferenceFailed):
    """There was no memory to run the model on this row: a matter of the moment, and not of the row."""

    retryable = True


class WorkerDied(ExecutionError):
    """The worker that held this request died."""

    retryable = True


class LoadError(ModelServeError):
    """A version cannot be taken into service; the version before it keeps serving."""


class ArtifactCorrupt(LoadError):
    """The bytes of an artifact are not the bytes that were registered. They are never loaded."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        super().__init__(f"artifact {key}: expected SHA-256 {expected}, found {found}")
        self.key = key
        self.expected = expected
        self.found = found


class ArtifactUnsafe(LoadError):
    """Loading this artifact could run code from it and that was not allowed, or nobody trusted here signed it."""


class LoadFailed(LoadError):
    """The artifact did not load, did not warm up, or did not reproduce its golden example."""


class TooLittleMemory(LoadFailed):
    """Loading this version could have the process, or its neighbours, killed for memory."""


class ConfigError(ModelServeError):
    """An option or a configuration file is wrong."""


class SchemaOutdated(ConfigError):
    """The database and this release do not fit: one of the two is older than the other can work with.

    ``found`` is the database's revision and ``wanted`` this release's. ``compatible_with`` is the oldest revision that
    a newer database still works with; None where the database is the older one.
    """

    def __init__(self, found: str, wanted: str, compatible_with: str | None = None) -> None:
        super().__init__(
            f"the database is at schema {found}, this release needs {wanted}; run `modelserve db upgrade`"
            if compatible_with is None
            else f"this process is older than the database: upgrade modelserve (the database is at schema {found}, "
            f"which takes a release that knows {compatible_with}; this one knows {wanted})"
        )
        self.found = found
        self.wanted = wanted
        self.compatible_with = compatible_with


class MissingDependency(ModelServeError, ImportError):
    """An optional driver is not installed; the message is the line that installs it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'modelserve[{extra}]'")
        self.module = module
        self.extra = extra


class ForkedServer(ModelServeError):
    """A started server was copied by ``fork``: its thread and its event loop stayed in the parent."""

    def __init__(self, started_in: int, used_in: int) -> None:
        super().__init__(
            f"this server was started in process {started_in} and copied by fork into {used_in}, where its "
            "threads do not exist; start it after the fork (gunicorn: in post_fork, or give ms.wsgi an unstarted one)"
        )


class LeaseLost(ModelServeError):
    """Another process has taken over: what was about to be written under the lease was refused."""

    def __init__(self, name: str, token: int) -> None:
        super().__init__(f"the lease {name} was lost: its token is no longer {token}")
        self.name = name
        self.token = token


def failure_of(error: BaseException) -> InferenceFailed:
    """Return what the callers of a batch get for what the model raised."""
    kind = OutOfMemory if isinstance(error, MemoryError) else InferenceFailed
    return kind(f"the model raised {describe(error)}")


def describe(error: BaseException) -> str:
    """Return the kind of an error and its message, also of one that cannot say it."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  # a foreign error's __str__ can do anything
        return type(error).__name__
