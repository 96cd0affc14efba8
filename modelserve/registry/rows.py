"""Rows to values, and the queries that more than one method needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import sqlalchemy as sa

from modelserve.database.tables import deployment, deployment_event, model_version
from modelserve.errors import ModelNotFound, VersionNotFound
from modelserve.registry.names import is_name
from modelserve.types import (
    Artifact,
    DeploymentEvent,
    DeploymentState,
    ModelVersion,
    Pointer,
    VersionPage,
    VersionSummary,
)

EXAMPLE_FORMAT = "example-json"
_MOST_NAMES: Final = 1000  # SQLite takes 32,766 parameters, PostgreSQL 65,535


def find_version(connection: sa.Connection, model_name: str, version: str) -> ModelVersion | None:
    """Read one version; None when there is none, or the text could not be a name at all."""
    if not (is_name(model_name) and is_name(version)):
        return None
    wanted = (model_version.c.model_name == model_name) & (model_version.c.version == version)
    row = connection.execute(sa.select(model_version).where(wanted)).one_or_none()
    return None if row is None else to_version(row)


def require_version(connection: sa.Connection, model_name: str, version: str) -> ModelVersion:
    """Read one version. Raises ``ModelNotFound``, ``VersionNotFound``."""
    found = find_version(connection, model_name, version)
    if found is None:
        require_model(connection, model_name)
        raise VersionNotFound(model_name, version)
    return found


def require_model(connection: sa.Connection, model_name: str, *, lock: bool = False) -> sa.Row[Any]:
    """Read a model's deployment row, if told with its lock. Raises ``ModelNotFound``."""
    if not is_name(model_name):
        raise ModelNotFound(model_name)
    query = sa.select(deployment).where(deployment.c.model_name == model_name)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise ModelNotFound(model_name)
    return row


def read_pointers(connection: sa.Connection, names: Collection[str] | None) -> dict[str, Pointer]:
    """Read where all models stand, or those of ``names`` that there are."""
    query = _of(names, sa.select(deployment.c.model_name, deployment.c.generation, deployment.c.production_id))
    found = {name: Pointer(*pointer) for name, *pointer in connection.execute(query)}
    return found if names is None else {name: found[name] for name in names if name in found}


def read_deployments(connection: sa.Connection, names: Collection[str] | None) -> dict[str, DeploymentState]:
    """Read what is wanted of all models, or those of ``names`` that there are, with the versions pointed at.

    It is one statement: between two, another transaction could commit.
    """
    pointers = (deployment.c.model_name, deployment.c.generation, deployment.c.production_id, deployment.c.previous_id)
    pointed_at = model_version.c.id.in_(pointers[2:])
    labelled = [column.label(f"deployed_{column.name}") for column in pointers]
    query = sa.select(*labelled, model_version).select_from(deployment.outerjoin(model_version, pointed_at))
    wanted: dict[str, Sequence[Any]] = {}
    versions: dict[tuple[str, int], ModelVersion] = {}
    for row in connection.execute(_of(names, query)):  # one or two of each model
        wanted[row[0]] = row[1:4]
        if row.id is not None:
            versions[row[0], row.id] = to_version(row)
    return {
        name: DeploymentState(
            model_name=name,
            generation=wanted[name][0],
            production=versions.get((name, wanted[name][1])),
            previous=versions.get((name, wanted[name][2])),
        )
        for name in (wanted if names is None else names)
        if name in wanted
    }


def _of(names: Collection[str] | None, query: sa.Select[Any]) -> sa.Select[Any]:
    """Restrict a query to some models, unless these are so many that reading all is the lesser evil."""
    if names is None or len(names) > _MOST_NAMES:
        return query
    return query.where(deployment.c.model_name.in_([name for name in names if is_name(name)]))


def read_page(connection: sa.Connection, model_name: str, limit: int, before: str | None) -> VersionPage:
    """Read up to ``limit`` versions, newest first, with the columns that a list shows; none for what is no name."""
    if not (is_name(model_name) and (before is None or is_name(before))):
        return VersionPage((), None)
    table = model_version.c
    shown = (table.version, table.status, table.framework, table.metrics, table.created_at)
    query = sa.select(*shown).where(table.model_name == model_name).order_by(table.id.desc()).limit(limit + 1)
    if before is not None:
        last = sa.select(table.id).where(table.model_name == model_name, table.version == before)
        query = query.where(table.id < last.scalar_subquery())
    found = tuple(VersionSummary(*row) for row in connection.execute(query))
    return VersionPage(found[:limit], found[limit - 1].version if len(found) > limit else None)


def read_events(connection: sa.Connection, model_name: str) -> list[DeploymentEvent]:
    """Read a model's events, oldest first; empty when there is no such model."""
    if not is_name(model_name):
        return []
    events = deployment_event
    query = sa.select(events).where(events.c.model_name == model_name).order_by(events.c.generation)
    return [to_event(row) for row in connection.execute(query)]


def standing(events: Iterable[DeploymentEvent]) -> list[str]:
    """Return the versions that rollbacks can reach, oldest first; the last one is in production.

    A version that was rolled back is not among them, unless it was promoted again since.
    """
    stack: list[str] = []
    for event in events:
        if event.action == "rollback":
            stack.pop()
        elif event.production is not None and event.production not in stack[-1:]:
            stack.append(event.production)
    return stack


def to_version(row: sa.Row[Any]) -> ModelVersion:
    """Make the value of a ``model_version`` row."""
    return ModelVersion(
        id=row.id,
        model_name=row.model_name,
        version=row.version,
        framework=row.framework,
        artifact=Artifact(
            key=row.artifact_s3_key, sha256=row.artifact_sha256, size=row.artifact_bytes, format=row.artifact_format
        ),
        signature=row.signature,
        load_options=row.load_options,
        example=_example(row),
        conversion=row.conversion,
        metrics=row.metrics,
        tags=row.tags,
        status=row.status,
        created_at=row.created_at,
        attestation=row.attestation,
    )


def to_event(row: sa.Row[Any]) -> DeploymentEvent:
    """Make the value of a ``deployment_event`` row."""
    return DeploymentEvent(
        model_name=row.model_name,
        generation=row.generation,
        action=row.action,
        version=row.version,
        production=row.production,
        previous=row.previous,
        actor=row.actor,
        reason=row.reason,
        occurred_at=row.occurred_at,
    )


def example_columns(example: Artifact | None) -> dict[str, str | int | None]:
    """Return what a golden example puts into its version's row."""
    if example is None:
        return dict.fromkeys(("example_s3_key", "example_sha256", "example_bytes"))
    return {"example_s3_key": example.key, "example_sha256": example.sha256, "example_bytes": example.size}


def _example(row: sa.Row[Any]) -> Artifact | None:
    if row.example_s3_key is None:
        return None
    return Artifact(key=row.example_s3_key, sha256=row.example_sha256, size=row.example_bytes, format=EXAMPLE_FORMAT)
