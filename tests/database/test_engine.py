"""The database behind the registry: addresses, first use, schema, faults."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from modelserve.database import engine as database
from modelserve.database.engine import Database
from modelserve.errors import BackendUnavailable, ConfigError, MissingDependency
from modelserve.registry import Registry
from modelserve.types import ModelVersion

Insert: TypeAlias = Callable[..., ModelVersion]

PASSWORD = "s3cret-w0rd"


# -- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_means_psycopg(scheme: str) -> None:
    """The driver is the same under any SQLAlchemy release and any provider's spelling."""
    assert Database(f"{scheme}://u@h/d").url.drivername == "postgresql+psycopg"


@pytest.mark.parametrize("url", ["mysql://u@h/d", "postgresql+asyncpg://u@h/d", "redis://h"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    """A database without migrations of ours is refused at once."""
    with pytest.raises(ConfigError, match=url.partition(":")[0].replace("+", r"\+")):
        Database(url)


@pytest.mark.parametrize("url", ["models.db", "", f"postgresql://u@h:{PASSWORD}/d"])
def test_an_unreadable_url_is_refused_without_repeating_it(url: str) -> None:
    """What cannot be parsed may hold a password anywhere, so neither message nor cause quotes it."""
    with pytest.raises(ConfigError) as caught:
        Database(url)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value, chain=True))


@pytest.mark.parametrize(
    "url", [f"postgresql://u:{PASSWORD}@127.0.0.1:1/d", f"postgresql://u@127.0.0.1:1/d?password={PASSWORD}"]
)
def test_a_password_is_never_shown(url: str) -> None:
    """Neither the repr nor an error with its whole chain of causes shows it."""
    registry = Registry(url)
    with pytest.raises(BackendUnavailable) as caught:
        registry.models()
    shown = [repr(registry), repr(registry._database), str(caught.value)]
    assert PASSWORD not in "".join([*shown, *traceback.format_exception(caught.value)])
    assert "127.0.0.1" not in str(caught.value)
    assert caught.value.retryable


@pytest.mark.parametrize("option", ["autocommit=true", "row_factory=x", "prepare_threshold=often"])
def test_options_that_would_break_a_transaction_are_refused(option: str) -> None:
    """What a URL can say to the driver does not include what every transaction relies on, nor nonsense."""
    with pytest.raises(ConfigError, match=r"cannot say|cannot be used"):
        Database(f"postgresql://u@h/d?{option}")


def test_options_of_the_driver_are_taken_and_not_passed_to_libpq() -> None:
    """``prepare_threshold`` is psycopg's own; ``sslmode`` and ``options`` are libpq's, for hints as well."""
    url = Database("postgresql://u@h/d?prepare_threshold=5&sslmode=require&options=-csearch_path%3Dml").libpq_url
    assert url is not None
    assert "prepare_threshold" not in url
    assert "sslmode=require" in url
    assert "options=-csearch_path%3Dml" in url


def test_a_missing_driver_answers_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL without psycopg says what to install."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingDependency, match=r"pip install 'modelserve\[postgres\]'"):
        Registry("postgresql://u@h/d")


def test_a_relative_file_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, insert: Insert) -> None:
    """A host that changes its directory keeps its registry."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    registry = Registry("sqlite:///models.db")
    monkeypatch.chdir("elsewhere")
    insert(registry, "churn", "1")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["models.db"]


def test_a_registry_in_memory_is_one_for_all_threads(insert: Insert) -> None:
    """What one thread registers another one reads."""
    with Registry("sqlite://") as registry:
        insert(registry, "churn", "1")
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: registry.models(), range(32)))
    assert found == [["churn"]] * 32


# -- first use and schema ----------------------------------------------------------------------------------


def test_construction_opens_nothing(tmp_path: Path) -> None:
    """A registry can be made at import time: the file appears at first use."""
    registry = Registry(f"sqlite:///{tmp_path / 'models.db'}")
    assert not list(tmp_path.iterdir())
    assert registry.models() == []
    assert list(tmp_path.iterdir())


def test_first_use_by_many_processes_makes_the_tables_once(run_workers: Callable[..., list[str]]) -> None:
    """Six processes that open one empty database at the same moment all find it ready."""
    assert run_workers("first_use", 6) == ["{}"] * 6


def test_first_use_by_many_threads_makes_the_tables_once(registry_url: str) -> None:
    """So do threads, each with a registry of its own."""

    def first_use(_: int) -> dict[str, int]:
        with Registry(registry_url) as registry:
            return registry.generations()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(first_use, range(8))) == [{}] * 8


def test_a_process_on_a_fitting_schema_needs_no_alembic(
    registry: Registry, run_workers: Callable[..., list[str]]
) -> None:
    """Checking the schema is one query, not an import of the migrations."""
    registry.upgrade()
    assert run_workers("modules", 1) == ["False"]


def test_upgrading_twice_changes_nothing(registry: Registry, insert: Insert) -> None:
    """An upgrade of what is up to date keeps every row."""
    insert(registry, "churn", "1")
    registry.upgrade()
    assert registry.models() == ["churn"]


def test_a_half_finished_migration_leaves_no_tables(registry: Registry, bare_engine: sa.Engine) -> None:
    """Migrations are one transaction: a table in the way fails them as a whole."""
    with bare_engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE deployment_event (mine INTEGER)"))
    with pytest.raises(BackendUnavailable, match="already exists"):
        registry.models()
    with bare_engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["deployment_event"]


def test_migrations_leave_logging_alone(registry: Registry) -> None:
    """No logger is configured or disabled, no handler added."""
    mine = logging.getLogger("host.app")
    before = (logging.root.level, list(logging.root.handlers), logging.getLogger("alembic").handlers[:])
    registry.upgrade()
    assert (logging.root.level, list(logging.root.handlers), logging.getLogger("alembic").handlers) == before
    assert not mine.disabled


# -- life in a host ----------------------------------------------------------------------------------------


def test_a_registry_made_before_a_fork_works_on_both_sides(
    registry: Registry, insert: Insert, run_workers: Callable[..., list[str]]
) -> None:
    """The forked copy uses a connection of its own; the parent keeps its own, and sees what the copy did."""
    insert(registry, "churn", "1")
    assert run_workers("fork", 1) == ["False\n0 1 True"]


def test_a_closed_registry_opens_again(registry: Registry, insert: Insert) -> None:
    """Close gives back the connections; the next use opens new ones."""
    insert(registry, "churn", "1")
    registry.close()
    registry.close()
    assert registry.models() == ["churn"]


def test_sqlite_is_set_up_for_many_processes(tmp_path: Path) -> None:
    """Readers do not wait (WAL), writers do (busy timeout), and references are checked."""
    with Database(f"sqlite:///{tmp_path / 'models.db'}").read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "busy_timeout", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "busy_timeout": 30_000, "foreign_keys": 1}


def test_sqlite_is_read_while_another_process_writes(tmp_path: Path, insert: Insert) -> None:
    """A writer that holds its lock holds up no reader."""
    registry = Registry(f"sqlite:///{tmp_path / 'models.db'}")
    insert(registry, "churn", "1")
    writer = sqlite3.connect(tmp_path / "models.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert registry.generations() == {"churn": 1}
    writer.close()


def test_a_lock_that_is_never_released_is_an_unavailable_backend(
    tmp_path: Path, insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change gives up after the time to wait for the lock, and may be tried again."""
    registry = Registry(f"sqlite:///{tmp_path / 'models.db'}")
    insert(registry, "churn", "1")
    monkeypatch.setattr(database, "_LOCK_WAIT_MS", 10)
    writer = sqlite3.connect(tmp_path / "models.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(BackendUnavailable, match="registry database is unavailable: database is locked"):
        registry.promote("churn", "1")
    writer.close()
    assert registry.promote("churn", "1").status == "production"


def test_a_missing_folder_is_an_unavailable_backend(tmp_path: Path) -> None:
    """The message says what is wrong without naming the path."""
    with pytest.raises(BackendUnavailable, match="unable to open database file") as caught:
        Registry(f"sqlite:///{tmp_path / 'none' / 'models.db'}").models()
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.postgres
def test_lost_connections_are_replaced(postgres_url: str, insert: Insert) -> None:
    """A restarted server costs the transaction it interrupted, and nothing after it."""
    killer = sa.create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    kill = sa.text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with Registry(postgres_url) as registry:
        insert(registry, "churn", "1")
        with killer.connect() as connection:
            connection.execute(kill)
        assert registry.models() == ["churn"]
        with pytest.raises(BackendUnavailable), registry._database.write() as interrupted:
            with killer.connect() as connection:
                connection.execute(kill)
            interrupted.execute(sa.text("SELECT 1"))
        assert registry.models() == ["churn"]
    killer.dispose()


def test_a_file_that_is_gone_does_not_come_back_empty(tmp_path: Path) -> None:
    """An empty database in its place would say that there are no models; a missing one is unavailable."""
    path = tmp_path / "models.db"
    database = Database(f"sqlite:///{path}")
    with database.read():
        pass
    path.rename(tmp_path / "moved.db")
    with pytest.raises(BackendUnavailable, match="registry database is unavailable: its file is gone"), database.read():
        pass
    assert not path.exists()
    (tmp_path / "moved.db").rename(path)
    with database.read():
        pass


def test_a_database_that_is_expected_is_not_created_by_readers(registry_url: str) -> None:
    """Where something was served before, no tables means that they are away; whoever writes may begin anew."""
    with contextlib.closing(Database(registry_url)) as database:
        database.expect()
        with (
            pytest.raises(BackendUnavailable, match=r"its file is gone|it is empty, and was not before"),
            database.read(),
        ):
            pass
        with database.write():
            pass
        with database.read():
            pass


def test_a_first_connection_that_hangs_keeps_no_others(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy sets an engine up at its first connection, under a lock that is not held forever."""
    set_up: Callable[[PGDialect_psycopg, sa.Connection], None] = PGDialect_psycopg.initialize
    begun, goes_on = threading.Event(), threading.Event()

    def hanging(dialect: PGDialect_psycopg, connection: sa.Connection) -> None:
        if not begun.is_set():
            begun.set()
            assert goes_on.wait(30)
        set_up(dialect, connection)

    def ask() -> int | None:
        with rows.read() as connection:
            return connection.scalar(sa.select(1))

    monkeypatch.setattr(PGDialect_psycopg, "initialize", hanging)
    monkeypatch.setattr(database, "_SET_UP_LIMIT_S", 0.0)
    rows = Database(postgres_url)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask)
        assert begun.wait(30)
        try:
            assert threads.submit(ask).result(timeout=20) == 1
        finally:
            goes_on.set()
        assert first.result(timeout=20) == 1
    rows.close()
