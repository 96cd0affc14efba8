"""The registry's rows: which versions there are, and which one is wanted in production.

Truth is a row. Every change happens in one transaction that holds the lock of the model's deployment row, raises its
generation and appends one event; hints go out after the commit.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import getpass
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from modelserve import plugins, signing
from modelserve.artifacts import ArtifactStore
from modelserve.database import clock
from modelserve.database.engine import Database
from modelserve.database.tables import model_version
from modelserve.errors import (
    ConfigError,
    InvalidTransition,
    ModelNotFound,
    VersionExists,
    VersionNotFound,
)
from modelserve.ports import ChangeHints, ChangeListener, ChangePublisher, SigningKey
from modelserve.registry.changes import Action, Change, create_deployment
from modelserve.registry.hints import Hints
from modelserve.registry.names import check_names
from modelserve.registry.registration import prepare
from modelserve.registry.rows import (
    example_columns,
    find_version,
    read_deployments,
    read_events,
    read_page,
    read_pointers,
    require_model,
    require_version,
    standing,
    to_version,
)
from modelserve.registry.values import check_text, plain_json
from modelserve.signature import MAX_BODY_BYTES, Signature
from modelserve.stores.inference_log import LogTable
from modelserve.types import (
    Artifact,
    DeploymentEvent,
    DeploymentState,
    FrameworkName,
    Json,
    ModelVersion,
    Pointer,
    VersionPage,
)


def _absolute(artifacts: str) -> str:
    """Return a folder's path as it is now, like that of the database: the host may change its directory."""
    return artifacts if "://" in artifacts else str(Path(artifacts).absolute())


class Registry:
    """Versions of models and their way to production, in SQLite (``sqlite:///models.db``) or PostgreSQL.

    ``artifacts`` says where the models' bytes are kept: an fsspec URL, or a store made with options of its own.
    ``changes`` is where servers in other processes are told of changes: ``"redis://…"``. One in PostgreSQL tells them
    by itself. Times are the database's, on which all processes agree; ``now`` (aware) replaces its clock.
    Nothing is opened before first use, which creates the tables in an empty database. One registry may be used from
    many threads, and by processes forked after it was made. Every method may raise ``BackendUnavailable`` when the
    database does not answer and ``SchemaOutdated`` when its tables do not fit this release.
    """

    def __init__(
        self,
        url: str,
        artifacts: str | ArtifactStore | None = None,
        *,
        changes: str | ChangePublisher | None = None,
        now: Callable[[], dt.datetime] | None = None,
    ) -> None:
        self._database = Database(url)
        self._artifacts = _absolute(artifacts) if isinstance(artifacts, str) else artifacts
        self._now = now
        self._hints = Hints(self._publisher(changes))

    def __repr__(self) -> str:
        return f"Registry({self._database.shown_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections, the store's too. Safe to call twice; later use opens new ones."""
        self._database.close()
        self._hints.disconnect()
        if isinstance(self._artifacts, ArtifactStore):
            self._artifacts.close()

    def expect(self) -> None:
        """Take an empty or missing database for one that is unavailable: what was served once came from somewhere.

        Readers alone are told so; who registers a version creates the tables as ever.
        """
        self._database.expect()

    def upgrade(self) -> None:
        """Bring the tables to this release. Safe when many processes do so at once."""
        self._database.upgrade()

    # -- reading -------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self.generations())

    def generations(self) -> dict[str, int]:
        """Return each model's generation, in one query."""
        return {name: pointer.generation for name, pointer in self.pointers().items()}

    def get(self, model_name: str, version: str) -> ModelVersion:
        """Return one version. Raises ``ModelNotFound``, ``VersionNotFound``."""
        with self._database.read() as connection:
            return require_version(connection, model_name, version)

    def versions(self, model_name: str) -> list[ModelVersion]:
        """Return a model's versions, newest first. Raises ``ModelNotFound``."""
        with self._database.read() as connection:
            require_model(connection, model_name)
            query = sa.select(model_version).where(model_version.c.model_name == model_name)
            return [to_version(row) for row in connection.execute(query.order_by(model_version.c.id.desc()))]

    def page(self, model_name: str, limit: int = 20, before: str | None = None) -> VersionPage:
        """Return the newest versions of a model, or the newest of those that were registered before another.

        One query that reads what a list shows and ``limit`` rows, however many there are. Raises ``ModelNotFound``, and
        ``VersionNotFound`` for an unknown ``before``.
        """
        with self._database.read() as connection:
            page = read_page(connection, model_name, limit, before)
            if not page.versions:
                require_model(connection, model_name)
                if before is not None:
                    require_version(connection, model_name, before)
            return page

    def production(self, model_name: str) -> ModelVersion:
        """Return the version in production. Raises ``ModelNotFound``, or ``VersionNotFound`` when there is none."""
        production = self.deployment(model_name).production
        if production is None:
            raise VersionNotFound(model_name, None)
        return production

    def deployment(self, model_name: str) -> DeploymentState:
        """Return what is wanted served for a model, as of one moment. Raises ``ModelNotFound``."""
        found = self.deployments([model_name])
        if model_name not in found:
            raise ModelNotFound(model_name)
        return found[model_name]

    def deployments(self, names: Collection[str] | None = None) -> dict[str, DeploymentState]:
        """Return what is wanted served for each model, or for each of ``names`` that there is, as of one moment."""
        with self._database.read() as connection:
            return read_deployments(connection, names)

    def pointers(self, names: Collection[str] | None = None) -> dict[str, Pointer]:
        """Return where each model stands, or each of ``names`` that there is: cheap enough for a poll each second."""
        with self._database.read() as connection:
            return read_pointers(connection, names)

    def history(self, model_name: str) -> list[DeploymentEvent]:
        """Return everything that was done to a model, oldest first. Raises ``ModelNotFound``."""
        with self._database.read() as connection:
            require_model(connection, model_name)
            return read_events(connection, model_name)

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener(model_name)`` after each change made through this object; return what ends it.

        It is called in the thread that made the change, which waits for it.
        """
        return self._hints.subscribe(listener)

    def change_hints(self, changes: str) -> ChangeHints:
        """Return what tells of changes by other processes: ``"postgres"``, this registry's database, or a URL.

        Raises ``ConfigError`` for what cannot tell of them and ``MissingDependency`` without its driver.
        """
        if changes != "postgres":
            return plugins.changes(changes)
        url = self._database.libpq_url
        if url is None:
            problem = "SQLite tells nobody of changes; give redis://…, or nothing, and they are found by polling"
            raise ConfigError(f"changes='postgres' takes a registry in PostgreSQL; {problem}")
        return plugins.changes(url)

    def inference_log(self, url: str | None = None) -> LogTable:
        """Return the inference log: the one in this registry's database, or in another (SQLite or PostgreSQL).

        It connects to nothing yet. Raises ``ConfigError`` for a URL that cannot be read.
        """
        if url is None:
            return LogTable(self._database, shared=True)
        if not isinstance(url, str):
            raise ConfigError(f"log: expected a database's URL, or False for no log, got {url!r:.40}")
        return LogTable(Database(url, "inference log"))

    def _publisher(self, changes: str | ChangePublisher | None) -> ChangePublisher | None:
        if not isinstance(changes, str):
            return changes
        hints = self.change_hints(changes)
        return hints if isinstance(hints, ChangePublisher) else None  # the database itself tells of them

    @property
    def shown_url(self) -> str:
        """The URL of the database, without its secrets."""
        return self._database.shown_url

    @property
    def artifacts(self) -> ArtifactStore:
        """The store of the models' bytes. Without ``artifacts=`` it is a folder beside a SQLite file."""
        if not isinstance(self._artifacts, ArtifactStore):
            self._artifacts = ArtifactStore(self._artifacts or self._folder_beside_database())
        return self._artifacts

    def _folder_beside_database(self) -> str:
        path = self._database.file
        if path is None:
            raise ConfigError("say where the models' bytes are kept: Registry(url, artifacts='s3://bucket/models')")
        return str(path.parent / "artifacts")

    # -- changing ------------------------------------------------------------------------------------------

    def register(
        self,
        model_name: str,
        version: str,
        model: Any,
        *,
        example: Any = None,
        signature: Signature | None = None,
        framework: str | None = None,
        method: str = "predict",
        trusted: Sequence[str] = (),
        format: str | None = None,  # noqa: A002  # the word for it
        factory: str | None = None,
        optimize: str | None = None,
        baseline: Any = None,
        max_body_bytes: int | None = MAX_BODY_BYTES,
        metrics: Mapping[str, Json] | None = None,
        tags: Mapping[str, str] | None = None,
        signing_key: str | Path | SigningKey | None = None,
        actor: str | None = None,
        reason: str = "",
    ) -> ModelVersion:
        """Save a model, prove that it loads and answers, and add it as a version with status ``staging``.

        ``model`` is a live object or the path of a saved one. ``example`` holds a few rows that the model takes (an
        array, a DataFrame, a mapping of columns): the signature is inferred from it, and the answers to it are
        checked again wherever the version is loaded. ``method`` is what a request calls; ``trusted`` lists types
        that the safe format would otherwise refuse; ``format`` picks another than the framework's safe default.
        ``factory`` (``"package.module:callable"``) builds the network that saved weights belong to. With
        ``optimize="onnx"`` the model is converted; what comes out has to answer the example, and up to 100,000 rows
        of ``baseline``, as the original does, and is served in its place. ``signing_key`` signs the version at once,
        as :meth:`sign` does later. A signature whose shortest request is larger than ``max_body_bytes`` is refused:
        give the limit of your mount (``ms.asgi(server, max_body_bytes=…)``), or None for a model that is asked from
        Python alone.

        Raises ``InvalidInput`` for what cannot be served, ``ArtifactUnsafe`` for types that would need trust, and
        ``VersionExists``: a version is registered once.
        """
        check_names(model_name, version)
        key = None if signing_key is None else signing.signing_key(signing_key)
        if self._exists(model_name, version):
            raise VersionExists(model_name, version)
        prepared = prepare(
            self.artifacts,
            model,
            framework=framework,
            method=method,
            example=example,
            signature=signature,
            trusted=trusted,
            format=format,
            factory=factory,
            optimize=optimize,
            baseline=baseline,
            max_body_bytes=max_body_bytes,
        )
        return self._insert(
            model_name=model_name,
            version=version,
            framework=prepared.framework,
            artifact=prepared.artifact,
            signature=prepared.signature,
            load_options=prepared.load_options,
            example=prepared.example,
            conversion=prepared.conversion,
            metrics=metrics or {},
            tags=tags or {},
            signing_key=key,
            actor=actor,
            reason=reason,
        )

    def sign(
        self,
        model_name: str,
        version: str,
        key: str | Path | SigningKey,
        *,
        actor: str | None = None,
        reason: str = "",
    ) -> ModelVersion:
        """Sign what the registry says of a version now; servers that require a signature then load it.

        ``key`` is an Ed25519 private key: PEM text, or the path of a file that holds it. A signature joins those of
        other keys; signing again with the same key changes nothing. Look at the version first, or sign it where it
        is registered: a signature vouches for whatever the row holds at this moment.

        Raises ``ModelNotFound``, ``VersionNotFound``, and ``InvalidInput`` for what is no such key.
        """
        line = signing.signed(signing.signing_key(key), signing.statement_of(self.get(model_name, version)))
        with self._change(model_name, "sign", actor, reason) as change:
            target = require_version(change.connection, model_name, version)
            attestation = signing.with_signature(target.attestation, line)
            if attestation == target.attestation:
                return target
            return change.attest(target, attestation)

    def promote(self, model_name: str, version: str, *, actor: str | None = None, reason: str = "") -> ModelVersion:
        """Put a version into production; the one before is archived and becomes ``previous``.

        Promoting what is in production already changes nothing. Raises ``ModelNotFound``, ``VersionNotFound``.
        """
        with self._change(model_name, "promote", actor, reason) as change:
            target = require_version(change.connection, model_name, version)
            if target.status == "production":
                return target
            return change.produce(target, previous=change.production)

    def rollback(self, model_name: str, *, actor: str | None = None, reason: str = "") -> ModelVersion:
        """Put the previous version back into production and archive the present one; return the former.

        Can be repeated back to the first version ever promoted. Raises ``ModelNotFound``, and ``InvalidTransition``
        when there is no earlier version to go back to.
        """
        with self._change(model_name, "rollback", actor, reason) as change:
            if change.previous is None:
                raise InvalidTransition(model_name, None, "there is no earlier version to go back to; promote one")
            earlier = standing(read_events(change.connection, model_name))[:-2]
            before = require_version(change.connection, model_name, earlier[-1]) if earlier else None
            return change.produce(change.previous, previous=before)

    def archive(self, model_name: str, version: str, *, actor: str | None = None, reason: str = "") -> ModelVersion:
        """Take a version out of staging; archiving an archived one changes nothing.

        Raises ``ModelNotFound``, ``VersionNotFound``, and ``InvalidTransition`` for the version in production.
        """
        with self._change(model_name, "archive", actor, reason) as change:
            target = require_version(change.connection, model_name, version)
            if target.status == "production":
                problem = "is in production; promote another version or roll back first"
                raise InvalidTransition(model_name, version, problem)
            if target.status == "archived":
                return target
            change.version = version
            return change.set_status(target, "archived")

    def _exists(self, model_name: str, version: str) -> bool:
        with self._database.read() as connection:
            return find_version(connection, model_name, version) is not None

    def _insert(
        self,
        *,
        model_name: str,
        version: str,
        framework: FrameworkName,
        artifact: Artifact,
        signature: Json,
        load_options: Mapping[str, Json],
        example: Artifact | None,
        conversion: Mapping[str, Json] | None,
        metrics: Mapping[str, Json],
        tags: Mapping[str, str],
        actor: str | None,
        reason: str,
        signing_key: SigningKey | None = None,
    ) -> ModelVersion:
        """Add the row of a version whose bytes are saved, in staging. Raises ``InvalidInput``, ``VersionExists``."""
        check_names(model_name, version)
        row = {
            "model_name": model_name,
            "version": version,
            "framework": framework,
            "artifact_s3_key": artifact.key,
            "artifact_sha256": artifact.sha256,
            "artifact_bytes": artifact.size,
            "artifact_format": artifact.format,
            "signature": plain_json("signature", signature),
            "load_options": plain_json("load_options", load_options),
            "conversion": None if conversion is None else plain_json("conversion", conversion),
            "metrics": plain_json("metrics", metrics),
            "tags": plain_json("tags", tags),
            "status": "staging",
            **example_columns(example),
        }
        if signing_key is not None:
            row["attestation"] = signing.signed(
                signing_key,
                signing.statement(
                    model_name=model_name,
                    version=version,
                    framework=framework,
                    artifact=artifact,
                    signature=row["signature"],
                    load_options=row["load_options"],
                    example=example,
                ),
            )
        with self._change(model_name, "register", actor, reason, create=True) as change:
            if find_version(change.connection, model_name, version) is not None:
                raise VersionExists(model_name, version)
            row["created_at"] = self._time(change.connection)
            change.connection.execute(sa.insert(model_version).values(row))
            change.version = version
            return require_version(change.connection, model_name, version)

    @contextlib.contextmanager
    def _change(
        self, model_name: str, action: Action, actor: str | None, reason: str, *, create: bool = False
    ) -> Iterator[Change]:
        """Open the one transaction in which a model's deployment may change, and hold its lock."""
        actor = _default_actor() if actor is None else actor
        check_text("actor", actor)
        check_text("reason", reason)
        with self._database.write() as connection:
            if create:
                create_deployment(connection, model_name, self._time(connection))
            change = Change.begin(connection, model_name)
            yield change
            if change.version is None:
                return
            change.save(action=action, actor=actor, reason=reason, now=self._time(connection))
        self._hints.publish(model_name)

    def _time(self, connection: sa.Connection) -> dt.datetime:
        return clock.now(connection) if self._now is None else self._now()


def _default_actor() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
