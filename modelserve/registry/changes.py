"""One change of one model's deployment, inside its transaction and under its lock."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Literal, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from modelserve.database.tables import deployment, deployment_event, model_version
from modelserve.ports import PG_CHANNEL
from modelserve.registry.rows import require_model, to_version
from modelserve.types import ModelVersion, Status

Action = Literal["register", "promote", "rollback", "archive", "sign"]


@dataclasses.dataclass(slots=True, kw_only=True)
class Change:
    """What one transaction makes of one model's deployment.

    ``version`` is the one that was acted upon; None while nothing changed, and then there is no new generation.
    """

    connection: sa.Connection
    model_name: str
    generation: int
    production: ModelVersion | None
    previous: ModelVersion | None
    version: str | None = None

    @classmethod
    def begin(cls, connection: sa.Connection, model_name: str) -> Self:
        """Lock the model's deployment to the end of the transaction. Raises ``ModelNotFound``."""
        row = require_model(connection, model_name, lock=True)
        pointed_at = model_version.c.id.in_([row.production_id, row.previous_id])
        found = {each.id: to_version(each) for each in connection.execute(sa.select(model_version).where(pointed_at))}
        return cls(
            connection=connection,
            model_name=model_name,
            generation=row.generation,
            production=found.get(row.production_id),
            previous=found.get(row.previous_id),
        )

    def produce(self, target: ModelVersion, *, previous: ModelVersion | None) -> ModelVersion:
        """Put ``target`` into production in the place of the present one."""
        if self.production is not None:  # first, or there would be two for a moment, which the database refuses
            self.set_status(self.production, "archived")
        self.production = self.set_status(target, "production")
        self.previous = previous
        return self.production

    def set_status(self, target: ModelVersion, status: Status) -> ModelVersion:
        """Write a version's status; it is the one acted upon, if it is the last."""
        changed = sa.update(model_version).where(model_version.c.id == target.id).values(status=status)
        self.connection.execute(changed)
        self.version = target.version
        return dataclasses.replace(target, status=status)

    def attest(self, target: ModelVersion, attestation: str) -> ModelVersion:
        """Write a version's signatures."""
        changed = sa.update(model_version).where(model_version.c.id == target.id).values(attestation=attestation)
        self.connection.execute(changed)
        self.version = target.version
        return dataclasses.replace(target, attestation=attestation)

    def save(self, *, action: Action, actor: str, reason: str, now: dt.datetime) -> None:
        """Raise the generation, write the deployment row, append the event, and on PostgreSQL notify of it."""
        self.generation += 1
        wanted = {
            "production_id": self.production and self.production.id,
            "previous_id": self.previous and self.previous.id,
            "generation": self.generation,
            "updated_at": now,
        }
        self.connection.execute(sa.update(deployment).where(deployment.c.model_name == self.model_name).values(wanted))
        event = {
            "model_name": self.model_name,
            "generation": self.generation,
            "action": action,
            "version": self.version,
            "production": self.production and self.production.version,
            "previous": self.previous and self.previous.version,
            "actor": actor,
            "reason": reason,
            "occurred_at": now,
        }
        self.connection.execute(sa.insert(deployment_event).values(event))
        if self.connection.dialect.name == "postgresql":  # sent with the commit, and never for what is rolled back
            self.connection.execute(sa.select(sa.func.pg_notify(PG_CHANNEL, self.model_name)))


def create_deployment(connection: sa.Connection, model_name: str, now: dt.datetime) -> None:
    """Add the model's deployment row unless it is there, also when another transaction adds it at this moment."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    row = insert(deployment).values(model_name=model_name, generation=0, updated_at=now)
    connection.execute(row.on_conflict_do_nothing())
