"""What other processes do to a registry in the tests: ``worker.py TASK URL``. Says ready, then waits for a line."""

from __future__ import annotations

import os
import sys
import warnings

import sqlalchemy as sa

from modelserve.registry import Registry


def first_use(registry: Registry) -> None:
    """Use a registry that may be empty; say what it holds."""
    print(registry.generations())


def upgrade(registry: Registry) -> None:
    """Upgrade a registry that may be older; say what it holds."""
    registry.upgrade()
    print(registry.generations())


def modules(registry: Registry) -> None:
    """Use a registry; say whether that took alembic."""
    registry.generations()
    print("alembic" in sys.modules)


def promote(registry: Registry) -> None:
    """Promote the versions 0 to 4 of ``churn``, four times over."""
    for step in range(20):
        registry.promote("churn", str((step + os.getpid()) % 5))
    print("done")


def fork(registry: Registry) -> None:
    """Use one registry before, during and after the life of a forked copy; say what each saw."""
    before = _connection_of(registry)
    child = os.fork()
    if child == 0:
        warnings.simplefilter("ignore", ResourceWarning)  # of psycopg, for the parent's connections left alone
        registry.promote("churn", "1")
        print(before is not None and _connection_of(registry) == before, flush=True)
        return
    _, status = os.waitpid(child, 0)
    print(status, registry.production("churn").version, _connection_of(registry) == before)


def _connection_of(registry: Registry) -> int | None:
    """Return the server process behind the registry's connection; None on SQLite, which has none."""
    with registry._database.read() as connection:
        if connection.dialect.name == "sqlite":
            return None
        return int(connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())


TASKS = {task.__name__: task for task in (first_use, upgrade, modules, promote, fork)}

if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    with Registry(sys.argv[2]) as registry:
        TASKS[sys.argv[1]](registry)
