"""What modelserve needs from the outside, as small protocols. Adapters satisfy them without inheriting."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

from modelserve.errors import BackendUnavailable
from modelserve.types import SAFE, Columns, FrameworkName, Json, LogRecord, Row, Runtime


class Model(Protocol):
    """A loaded model."""

    def infer(self, columns: Columns) -> Columns:
        """Answer a batch: same number of rows out as in, in the same order."""
        ...


@runtime_checkable
class AnswersAsGiven(Protocol):
    """What a :class:`Model` may have besides: being asked as its owner asks it, with nothing in between.

    Registration compares this with what is served. A model without it is compared behind the batch contract only.
    """

    def answer_as_given(self, example: Any) -> Columns:
        """Answer example rows in the form in which their owner has them, by the method that was registered.

        ``example`` is of any form that :meth:`modelserve.Signature.infer` reads. Raises anything where the model does
        not take such rows.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class SavedModel:
    """What a framework adapter leaves after saving: a file or a folder, its format, and what it takes to read it again.

    ``runs_code`` says that loading it can run code that it brings. Such a file is not opened where it is registered by
    its path: it may be a stranger's.
    """

    path: Path
    format: str
    load_options: Mapping[str, Json]
    runs_code: bool = False


@runtime_checkable
class Framework(Protocol):
    """Saves and loads the models of one framework. One loader per format; never a fallback to another."""

    name: FrameworkName

    def save(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns | None = None) -> SavedModel:
        """Write ``model`` (an object, or the path of what was written already) into ``folder``.

        ``options`` holds what the user asked for: ``method``, ``trusted``, ``format``, ``factory``; and as
        ``missing_strings`` what stands for a missing string to the model, by input, as far as that is known: one of
        :data:`modelserve.signature.MARKS`. ``example`` is a batch of at least one row that the model takes, for formats
        that record how a model is called.
        Raises ``InvalidInput`` naming the option or the input that does not fit, and ``ArtifactUnsafe`` when the safe
        format would need trust that was not given.
        """
        ...

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> Model:
        """Make a live object answer batches, exactly as it will once loaded."""
        ...

    def load(self, path: Path, format: str, load_options: Mapping[str, Json], runtime: Runtime = SAFE) -> Model:  # noqa: A002
        """Read a saved model, in a format of :meth:`save`, to run where and as ``runtime`` says.

        Raises ``ArtifactUnsafe`` before any byte of a format that is not allowed is run, and ``LoadFailed`` for what
        cannot be read, or cannot run there.
        """
        ...


class Converter(Protocol):
    """Turns a fitted model into another format that answers the same, and sooner."""

    framework: FrameworkName
    """Whose adapter serves what comes out."""

    def convert(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns) -> Iterator[SavedModel]:
        """Write the model into ``folder`` in each way there is, the preferred one first.

        ``options`` is what :meth:`Framework.save` gets. Ends, or raises ``InvalidInput``, when there is no other way.
        """
        ...


class Replica(Protocol):
    """One worker that holds one loaded model and runs one batch at a time, in the order they were handed to it.

    All of it is called from one event loop.
    """

    async def start(self) -> None:
        """Load the model. Raises ``LoadError``."""
        ...

    def infer(self, rows: Sequence[Row]) -> asyncio.Future[list[Json]]:
        """Run the rows as one batch; give one plain value per row, in order. Fails with ``ExecutionError``.

        Where rows become columns, and columns values again, is the replica's business. A second batch may be
        handed over while the first one runs. When the replica dies, the batch that ran fails with ``WorkerDied``
        and one that was not begun with :class:`NotRun`.
        """
        ...

    async def stop(self) -> None:
        """Finish the running batch, free the model. Safe to call twice."""
        ...

    def kill(self, reason: str) -> None:
        """Take no more batches and give up the one that runs, at once; the replica ends as soon as it can."""
        ...

    async def ended(self) -> str:
        """Wait until nothing is left of it, whether it was stopped, killed or died by itself; say what happened."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can take a batch."""
        ...

    def detail(self) -> Mapping[str, Json]:
        """Tell about itself what its kind has to tell."""
        ...


class NotRun(Exception):
    """A replica has ended before it began this batch: another may run it as if nothing had happened."""


class SigningKey(Protocol):
    """A private key that signs versions, wherever it is kept."""

    key_id: str
    """SHA-256 of the public key's SubjectPublicKeyInfo, in lower-case hex."""

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of a message: 64 bytes."""
        ...


class TrustedKey(Protocol):
    """A public key whose signatures count."""

    key_id: str

    def accepts(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature was made of this message, by the key that belongs to this one."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class KeyPair:
    """A private and a public key, as PEM text."""

    private: str = dataclasses.field(repr=False)
    public: str


class Keys(Protocol):
    """Makes and reads keys."""

    def generate(self) -> KeyPair:
        """Make a new pair."""
        ...

    def signing_key(self, pem: bytes) -> SigningKey:
        """Read a private key. Raises ``InvalidInput``."""
        ...

    def trusted_key(self, pem: bytes) -> TrustedKey:
        """Read a public key. Raises ``InvalidInput``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceVersion:
    """One version in another registry: its exact URI, what it is called there, and what is known of it."""

    uri: str
    name: str
    version: str
    metrics: Mapping[str, Json]
    tags: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A model from another registry, as ours takes it: a live object or the path of a saved one, and its inputs.

    ``signature`` is the JSON form of :class:`modelserve.Signature`; it and ``example`` are None where unknown.
    """

    model: Any
    framework: FrameworkName
    method: str
    format: str | None
    signature: Json
    example: Any


class ModelSource(Protocol):
    """Another registry that models are taken over from. It is read, at the time of an import, and never written."""

    def locate(self, uri: str) -> SourceVersion:
        """Return the version that a URI means now. Raises ``InvalidInput`` for none, ``BackendUnavailable``."""
        ...

    def fetch(self, found: SourceVersion, folder: Path, *, allow_pickle: bool) -> SourceModel:
        """Download a version into ``folder`` and make it what our registry takes; what it needs stays there.

        Raises ``InvalidInput`` for what cannot be served, ``ArtifactUnsafe`` for a pickle that is not allowed.
        """
        ...


ChangeListener: TypeAlias = Callable[[str | None], None]
"""Takes the name of a model that may have changed, or None: any may have."""
PG_CHANNEL: Final = "modelserve"
"""The channel on which a registry in PostgreSQL notifies of its changes. Each database has its own."""


@runtime_checkable
class ChangeHints(Protocol):
    """Tells that a model's deployment may have changed. Hints may be lost, repeated or late: a poll covers them."""

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener(model_name)`` on changes, from any thread; return what ends the subscription. Does not wait.

        ``listener(None)`` is called whenever a connection has been made: what changed before it was not told.
        """
        ...

    def ping(self) -> None:
        """Raise ``BackendUnavailable`` when what carries the hints does not answer."""
        ...

    def close(self) -> None:
        """End every subscription, the threads and the connections. Safe to call twice; later use starts anew."""
        ...


@runtime_checkable
class ChangePublisher(Protocol):
    """Tells other processes of a change, where the database does not do so itself."""

    def publish(self, model_name: str) -> None:
        """Tell that a model changed, within a short bound. Raises ``BackendUnavailable`` when it could not be told."""
        ...

    def close(self) -> None:
        """Close the connections. Later use opens new ones."""
        ...


class CacheItem(NamedTuple):
    """A value to keep under a key for ``ttl_s`` seconds."""

    key: str
    value: bytes
    ttl_s: float


@runtime_checkable
class Cache(Protocol):
    """Keeps values that can be computed again, for this process or for several. It may forget any of them at any time.

    It is asked on one event loop, and used by one loop after another only with a :meth:`close` in between. There is at
    most one read and one write at a time. Each may raise ``BackendUnavailable``.
    """

    budget_s: float
    """How long a read may take, in seconds, before whoever waits goes on without it."""

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Return what is kept under each key, in order; None for what is not, or is not a value of this cache's."""
        ...

    async def put_many(self, items: Sequence[CacheItem]) -> None:
        """Keep each value for its time, in place of whatever was there."""
        ...

    async def clear(self, prefix: str) -> int:
        """Forget every key that begins with ``prefix``; return how many there were."""
        ...

    async def ping(self) -> None:
        """Raise ``BackendUnavailable`` when it does not answer."""
        ...

    async def close(self) -> None:
        """Close the connections. Safe to call twice; later use opens new ones."""
        ...


class LogStore(Protocol):
    """Where the inference log is written. Called from one thread, which may wait."""

    @property
    def shown_url(self) -> str:
        """Where it is, without secrets."""
        ...

    def may_write(self) -> bool:
        """Whether this account may add records at all. Raises ``BackendUnavailable`` when nobody can tell now."""
        ...

    def append(self, records: Sequence[LogRecord]) -> None:
        """Add records, all or none of them; those whose ids are there already change nothing.

        Raises ``BackendUnavailable`` for what may pass, and another error for records that it cannot hold.
        """
        ...

    def close(self) -> None:
        """Close the connections. Later use opens new ones."""
        ...


class OpenObject(NamedTuple):
    """An object that is being read.

    ``tag`` tells one state of it from another (None where the store has no such thing), ``size`` is the number of bytes
    of the whole (None: unknown), and ``pieces`` are its bytes from where reading began.
    """

    tag: str | None
    size: int | None
    pieces: Iterator[bytes]


class ObjectReader(Protocol):
    """Reads the objects of one kind of store. Each call is one attempt: who tries again is the caller."""

    def open(self, path: str, start: int, tag: str | None) -> contextlib.AbstractContextManager[OpenObject]:
        """Open the object at ``path`` from byte ``start`` on, as long as it is the one that had ``tag``.

        Opening it and reading its pieces raise :class:`Interrupted` for what may pass, :class:`ObjectChanged` when
        another object is in its place, ``FileNotFoundError`` when there is none, and ``BackendUnavailable`` for
        what asking again does not help: no right to read it, no such bucket, no credentials.
        """
        ...

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        ...


class FeatureKey(NamedTuple):
    """One row of a feature store (a group and an entity's key in it), and the features of it that are wanted."""

    group: str
    key: str
    names: tuple[str, ...]


class NoValue(enum.Enum):
    """Stands for a value that a store does not have, or has in a form that nobody can read."""

    MISSING = "missing"
    UNREADABLE = "error"


class FeatureRow(NamedTuple):
    """What a store has in one row: a value (or :class:`NoValue`) per feature wanted, in that order.

    ``written_at`` is the Unix time in seconds at which the values were true; None where the store does not know.
    """

    values: tuple[Json | NoValue, ...]
    written_at: float | None


class FeatureRecord(NamedTuple):
    """One row to be written: its values as JSON text, and the Unix time in seconds at which they were true."""

    group: str
    key: str
    values: Mapping[str, bytes]
    written_at: float


@runtime_checkable
class FeatureStore(Protocol):
    """Keeps features by group and key. Serving reads it; training jobs write it.

    A row that was never written is no error: all its values are missing, and so is its time.
    """

    async def read(self, wanted: Sequence[FeatureKey], within_s: float) -> Sequence[FeatureRow | BackendUnavailable]:
        """Read many rows at once; give what became of each, in order.

        Whoever asks has gone after ``within_s`` seconds: nothing is tried again after that. It is called several
        times at once, from one event loop, which it does not block. Raises ``BackendUnavailable`` when none could be
        read, within a second or two at most: a read that nobody waits for any more is not cancelled, but has to end.
        """
        ...

    def write(self, records: Sequence[FeatureRecord]) -> None:
        """Write rows, each in place of the one before it. It blocks. Raises ``BackendUnavailable``."""
        ...

    def ping(self) -> None:
        """Ask whether it answers. It blocks. Raises ``BackendUnavailable``."""
        ...

    async def close(self) -> None:
        """Close the connections. Safe to call twice; later use opens new ones."""
        ...


@runtime_checkable
class OpenedAhead(Protocol):
    """What a :class:`FeatureStore` may have besides: opening that takes seconds, and knowing which features exist."""

    async def open(self, wanted: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """Get ready to read these features of these groups. A server waits for it when it starts.

        Raises ``ConfigError`` for what can never be read, which keeps the server from starting, and
        ``BackendUnavailable``, which does not.
        """
        ...


class Interrupted(Exception):
    """A transfer broke off, or did not begin, for a reason that may pass; the message is that reason in a few words."""


class ObjectChanged(Exception):
    """Another object is in the place of the one whose beginning was read."""
