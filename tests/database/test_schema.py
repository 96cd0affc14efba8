"""Rolling upgrades: a process and a database of different releases, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

import modelserve as ms
from modelserve.database.engine import Database
from modelserve.database.tables import HEAD, VERSION_TABLE
from modelserve.errors import SchemaOutdated
from modelserve.registry import Registry
from modelserve.testing.models import telltale
from tests.database.migrating import REAL, compatible_with, contractions, future, migrate, shape
from tests.registries import Insert
from tests.stores.test_inference_log import ids, record

EXPANSION: Final = """
op.add_column("model_version", sa.Column("owner", sa.Text()))
op.add_column("model_version", sa.Column("priority", sa.Integer(), nullable=False, server_default="7"))
op.add_column("deployment", sa.Column("policy", sa.String(16), nullable=False, server_default="manual"))
op.add_column("deployment_event", sa.Column("details", sa.Text()))
op.add_column("inference_log", sa.Column("arm", sa.String(16), nullable=False, server_default="production"))
op.add_column("lease", sa.Column("note", sa.Text()))
op.create_table("traffic_look", sa.Column("id", sa.Integer(), primary_key=True))
"""
CONTRACTION: Final = """
with op.batch_alter_table("inference_log") as table:
    table.drop_column("degraded")
op.execute("UPDATE modelserve_alembic_version SET compatible_with = '9002'")
"""
X = np.array([[1.0], [2.0]])
MOMENT: Final = record().occurred_at


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The migrations of the two releases after this one: 9001 expands, 9002 contracts."""
    folder = tmp_path / "later"
    folder.mkdir()
    return future(folder, {"9001": EXPANSION, "9002": CONTRACTION}, HEAD)


# -- migrations --------------------------------------------------------------------------------------------


def revisions() -> list[str]:
    """Return the revisions, oldest first."""
    return [each.revision for each in ScriptDirectory(REAL).walk_revisions()][::-1]


def test_revisions_compare_as_texts() -> None:
    """They are numbers of four digits, in rising order."""
    assert all(len(each) == 4 and each.isdigit() for each in revisions())
    assert revisions() == sorted(revisions())


def test_migrations_only_expand(registry_url: str, bare_engine: sa.Engine) -> None:
    """No migration takes away what the release before relies on, unless it raises the mark to itself."""
    before: dict[str, dict[str, Any]] = {}
    for revision in revisions():
        migrate(bare_engine, revision)
        after = shape(bare_engine)
        assert compatible_with(bare_engine) == revision or contractions(before, after) == [], revision
        before = after


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ('op.drop_table("inference_log")', "inference_log: dropped or renamed"),
        ('op.rename_table("inference_log", "log")', "inference_log: dropped or renamed"),
        ('table.drop_column("actor")', "deployment_event.actor: dropped or renamed"),
        ('table.alter_column("previous", new_column_name="before")', "deployment_event.previous: dropped or renamed"),
        ('table.alter_column("action", type_=sa.String(64))', "deployment_event.action: another type"),
        ('table.alter_column("production", nullable=False)', "deployment_event.production: NOT NULL since"),
        (
            'table.add_column(sa.Column("n", sa.Integer(), nullable=False))',
            "deployment_event.n: NOT NULL without a server default",
        ),
        ('table.create_unique_constraint("uq_reason", ["reason"])', "deployment_event: unique changed"),
        ('table.create_check_constraint("ck_reason", sa.text("reason <> \'x\'"))', "deployment_event: checks changed"),
        (EXPANSION, None),
    ],
)
def test_what_does_not_expand_is_found(tmp_path: Path, bare_engine: sa.Engine, step: str, found: str | None) -> None:
    """Each kind of contraction is named, and an expansion is none."""
    if step.startswith("table."):
        step = f'with op.batch_alter_table("deployment_event") as table:\n    {step}'
    migrate(bare_engine, HEAD)
    before = shape(bare_engine)
    migrate(bare_engine, "9001", future(tmp_path, {"9001": step}, HEAD))
    assert contractions(before, shape(bare_engine)) == ([] if found is None else [found])


# -- an older database -------------------------------------------------------------------------------------


def test_an_older_database_is_refused_with_the_command_that_upgrades_it(
    registry_url: str, bare_engine: sa.Engine, insert: Insert
) -> None:
    """One of the release before has no mark; it is left as it is until it is upgraded, and then keeps its rows."""
    migrate(bare_engine, "0001")
    now = "2026-11-25 12:00:00"
    with bare_engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO deployment (model_name, generation, updated_at) VALUES ('churn', 3, '{now}')"  # noqa: S608  # a constant
        )
    with Registry(registry_url) as registry:
        with pytest.raises(SchemaOutdated, match=r"schema 0001.*needs 0002; run `modelserve db upgrade`") as caught:
            registry.models()
        assert (caught.value.found, caught.value.wanted, caught.value.compatible_with) == ("0001", HEAD, None)
        assert compatible_with(bare_engine) is None
        registry.upgrade()
        assert registry.generations() == {"churn": 3}
        insert(registry, "churn", "1")
        assert registry.promote("churn", "1").status == "production"
    assert compatible_with(bare_engine) == "0002"


def test_what_the_release_before_writes_is_still_taken(bare_engine: sa.Engine) -> None:
    """A process at 0001 that runs on beside 0002 sends the statements of its own tables; they hold."""
    migrate(bare_engine, "0001")
    old = sa.MetaData()
    old.reflect(bare_engine)
    migrate(bare_engine, HEAD)
    with bare_engine.begin() as connection:
        for table in old.tables.values():
            connection.execute(sa.select(table)).all()
        connection.execute(sa.insert(old.tables["deployment"]).values(model_name="m", generation=0, updated_at=MOMENT))
    assert {"model_version", "deployment", "deployment_event", "inference_log"} <= old.tables.keys()


# -- a newer database --------------------------------------------------------------------------------------


def test_an_old_process_goes_on_and_restarts_beside_a_compatible_schema(
    registry_url: str, bare_engine: sa.Engine, later: Path, insert: Insert
) -> None:
    """Before and after the upgrade by the next release it registers, promotes, rolls back, reads and logs."""
    with Registry(registry_url) as running:
        insert(running, "churn", "1")
        migrate(bare_engine, "9001", later)
        with Registry(registry_url) as restarted:
            for number, registry in enumerate((running, restarted), start=2):
                insert(registry, "churn", str(number))
                assert registry.promote("churn", str(number)).status == "production"
                registry.inference_log().append([record()])
                assert registry.production("churn").version == str(number)
                registry.upgrade()
            assert restarted.rollback("churn").version == "2"
            assert len(restarted.history("churn")) == 6
            assert len(ids(restarted.inference_log())) == 2
    with bare_engine.connect() as connection:
        assert connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar() == "9001"  # noqa: S608  # a constant
        assert set(connection.execute(sa.text("SELECT priority FROM model_version")).scalars()) == {7}


async def test_an_old_server_serves_promotes_and_logs_beside_it(
    registry_url: str, bare_engine: sa.Engine, later: Path, tmp_path: Path
) -> None:
    """A server that was started before the upgrade follows promotions after it, and so does one that starts then."""
    training = Registry(registry_url, artifacts=str(tmp_path / "artifacts"))
    for number in (1, 2):
        await asyncio.to_thread(training.register, "m", str(number), telltale(number), example=X)
    await asyncio.to_thread(training.promote, "m", "1")
    options = {"m": ms.ModelOptions(log_sample_rate=1.0)}

    @contextlib.asynccontextmanager
    async def served() -> AsyncIterator[ms.AsyncModelServer]:
        registry = Registry(registry_url, artifacts=str(tmp_path / "artifacts"))
        async with ms.AsyncModelServer(registry, options, cache_dir=tmp_path / "cache", poll_s=0.02) as server:
            yield server
        await asyncio.to_thread(registry.close)

    async with served() as running:
        await running.predict("m", {"x": [3.0]})
        await asyncio.to_thread(migrate, bare_engine, "9001", later)
        async with served() as restarted:
            await asyncio.to_thread(training.promote, "m", "2")
            async with asyncio.timeout(30):
                for each in (running, restarted):
                    while (await each.predict("m", {"x": [3.0]})).model_version != "2":  # noqa: ASYNC110  # a poll finds it
                        await asyncio.sleep(0.01)
    with bare_engine.connect() as connection:
        logged = connection.execute(sa.text("SELECT arm, count(*) FROM inference_log GROUP BY arm")).all()
    assert [arm for arm, _ in logged] == ["production"]
    assert logged[0][1] >= 3
    await asyncio.to_thread(training.close)


def test_a_newer_incompatible_database_says_to_upgrade_the_process(
    registry_url: str, bare_engine: sa.Engine, later: Path
) -> None:
    """A contraction is refused by use and by upgrade, and never with the advice to upgrade the database."""
    migrate(bare_engine, "9002", later)
    with Registry(registry_url) as registry:
        for use in (registry.models, registry.upgrade):
            with pytest.raises(
                SchemaOutdated, match="this process is older than the database: upgrade modelserve"
            ) as caught:
                use()
            assert "db upgrade" not in str(caught.value)
            assert (caught.value.found, caught.value.compatible_with) == ("9002", "9002")


def test_a_newer_database_without_a_mark_is_compatible_with_itself_alone(tmp_path: Path) -> None:
    """A SQLite file that has a later revision and no mark is not guessed at."""
    with contextlib.closing(sqlite3.connect(tmp_path / "models.db")) as connection:
        connection.execute(f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32))")
        connection.execute(f"INSERT INTO {VERSION_TABLE} VALUES ('9001')")  # noqa: S608  # a constant
        connection.commit()
    with Registry(f"sqlite:///{tmp_path / 'models.db'}") as registry, pytest.raises(SchemaOutdated, match="older than"):
        registry.models()


# -- who upgrades ------------------------------------------------------------------------------------------


def test_an_older_database_upgraded_by_many_at_once_is_upgraded_once(
    registry_url: str, bare_engine: sa.Engine, run_workers: Callable[..., list[str]]
) -> None:
    """Six processes that upgrade at the same moment wait for each other."""
    migrate(bare_engine, "0001")
    assert run_workers("upgrade", 6) == ["{}"] * 6


def test_two_releases_that_upgrade_at_once_end_at_the_later_one(
    registry_url: str, bare_engine: sa.Engine, later: Path
) -> None:
    """The older release finds the newer schema under the lock, and leaves it."""
    migrate(bare_engine, "0001")

    def old(_: int) -> None:
        with contextlib.closing(Database(registry_url)) as database:
            database.upgrade()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(old, range(4))) == [None] * 4
    migrate(bare_engine, "9001", later)
    old(0)
    with Registry(registry_url) as registry:
        assert registry.models() == []


def test_an_account_that_only_reads_needs_no_new_right(postgres_url: str, later: Path, insert: Insert) -> None:
    """The grants of the release before are enough to read this and the next schema, and to find nothing to upgrade."""
    engine = sa.create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))

    def bare(statement: str) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text(statement))

    migrate(engine, "0001")
    bare("DROP ROLE IF EXISTS serving_only")
    bare("CREATE ROLE serving_only LOGIN")
    bare("GRANT SELECT ON modelserve_alembic_version, model_version, deployment TO serving_only")
    try:
        with Registry(postgres_url) as owner:
            owner.upgrade()
            insert(owner, "churn", "1")
        for revision in (HEAD, "9001"):
            migrate(engine, revision, later)
            with Registry(postgres_url.replace("postgres@", "serving_only@")) as registry:
                registry.upgrade()
                assert registry.models() == ["churn"]
    finally:
        bare("DROP OWNED BY serving_only")
        bare("DROP ROLE serving_only")
        engine.dispose()
