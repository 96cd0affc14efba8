"""What a lease promises, on SQLite and on a real PostgreSQL: one holder, fenced off when it is lost."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import modelserve
from modelserve.database import clock
from modelserve.database.engine import Database
from modelserve.errors import LeaseLost
from modelserve.stores.leases import Lease, Leases, fence
from tests.stores import lease_worker

NOON = dt.datetime(2026, 11, 25, 12, tzinfo=dt.UTC)
TERM_S = 30.0
Worker: TypeAlias = "subprocess.Popen[str]"


class VirtualClock:
    """The database's clock, set by the test."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self, _: sa.Connection) -> dt.datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        """Move it, back as well."""
        self.time += dt.timedelta(seconds=seconds)


@pytest.fixture
def database(registry_url: str) -> Iterator[Database]:
    """A database with a table of work that is done under a lease."""
    with contextlib.closing(Database(registry_url)) as database:
        number = "SERIAL" if registry_url.startswith("postgresql") else "INTEGER"
        with database.write() as connection:
            connection.execute(sa.text(f"CREATE TABLE work (id {number} PRIMARY KEY, token INTEGER NOT NULL)"))
        yield database


@pytest.fixture
def virtual() -> VirtualClock:
    """A clock at noon."""
    return VirtualClock()


def work(database: Database) -> list[int]:
    """Return the tokens under which rows were written, in order."""
    with database.read() as connection:
        return list(connection.execute(sa.text("SELECT token FROM work ORDER BY id")).scalars())


def contender(database: Database, name: str, now: Callable[[sa.Connection], dt.datetime] = clock.now) -> Leases:
    return Leases(database, shared=True, holder=name, now=now)


def test_one_holds_and_the_next_gets_it_at_its_release(database: Database, virtual: VirtualClock) -> None:
    """While one holds it the other gets nothing; after a release it does at once, under a higher token."""
    one, two = (contender(database, name, virtual) for name in ("one", "two"))
    first = one.acquire("work", TERM_S)
    assert first is not None
    assert one.acquire("work", TERM_S) is None
    assert two.acquire("work", TERM_S) is None
    assert two.acquire("other", TERM_S) is not None
    one.release(first)
    second = two.acquire("work", TERM_S)
    assert second is not None
    assert second.token > first.token
    one.release(first)
    assert one.acquire("work", TERM_S) is None


def test_a_lease_lapses_after_its_term_unless_it_is_renewed(database: Database, virtual: VirtualClock) -> None:
    """Renewing begins the term again; one that is lost is replaced when the term has passed, and not before."""
    one, two = (contender(database, name, virtual) for name in ("one", "two"))
    first = one.acquire("work", TERM_S)
    assert first is not None
    virtual.advance(TERM_S - 1)
    one.renew(first)
    virtual.advance(TERM_S - 0.001)
    assert two.acquire("work", TERM_S) is None
    virtual.advance(0.001)
    second = two.acquire("work", TERM_S)
    assert second is not None
    with pytest.raises(LeaseLost, match="the lease work was lost"):
        one.renew(first)


def test_one_that_lapsed_may_be_renewed_while_it_is_free(database: Database, virtual: VirtualClock) -> None:
    """A holder that was slow goes on if no other took its place; one that released it does not."""
    one = contender(database, "one", virtual)
    lease = one.acquire("work", TERM_S)
    assert lease is not None
    virtual.advance(2 * TERM_S)
    one.renew(lease)
    assert contender(database, "two", virtual).acquire("work", TERM_S) is None
    one.release(lease)
    with pytest.raises(LeaseLost):
        one.renew(lease)


def test_a_write_under_a_lost_lease_is_refused(database: Database, virtual: VirtualClock) -> None:
    """The whole transaction is, whatever it did before the lease was looked at."""
    first = contender(database, "one", virtual).acquire("work", TERM_S)
    assert first is not None
    lease_worker.write(database, first)
    virtual.advance(TERM_S)
    lease_worker.write(database, first)  # lapsed, and no other process has it
    second = contender(database, "two", virtual).acquire("work", TERM_S)
    assert second is not None
    with pytest.raises(LeaseLost), database.write() as connection:
        connection.execute(sa.text("INSERT INTO work (token) VALUES (99)"))
        fence(connection, first)
    lease_worker.write(database, second)
    assert work(database) == [first.token, first.token, second.token]


@pytest.mark.parametrize("jump_s", [-86_400.0, -3600.0, 86_400.0])
def test_a_database_clock_that_jumps_keeps_no_lease_for_ever(
    database: Database, virtual: VirtualClock, jump_s: float
) -> None:
    """After a jump of the database's own clock a lost holder is replaced within a term, and is fenced off."""
    first = contender(database, "one", virtual).acquire("work", TERM_S)
    assert first is not None
    virtual.advance(jump_s)
    second = contender(database, "two", virtual).acquire("work", TERM_S)
    assert second is not None
    assert lease_worker.attempt(database, first) == "lost"
    assert lease_worker.attempt(database, second) == "written"


def test_a_small_step_back_costs_no_holder_its_lease(database: Database, virtual: VirtualClock) -> None:
    """A clock that is corrected by less than a term leaves the holder alone."""
    first = contender(database, "one", virtual).acquire("work", TERM_S)
    assert first is not None
    virtual.advance(-TERM_S / 2)
    assert contender(database, "two", virtual).acquire("work", TERM_S) is None


@pytest.mark.parametrize("skew_s", [-86_400.0, 86_400.0])
def test_the_clock_of_the_host_does_not_matter(
    database: Database, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    """A process whose clock is a day ahead or behind neither takes a lease that is held nor writes one that is odd."""
    lease = contender(database, "one").acquire("work", TERM_S)
    assert lease is not None
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew_s)
    other = contender(database, "two")
    assert other.acquire("work", TERM_S) is None
    assert other.acquire("other", TERM_S) is not None
    assert contender(database, "one").acquire("other", TERM_S) is None


# -- real processes ----------------------------------------------------------------------------------------


@pytest.fixture
def start(registry_url: str, database: Database) -> Iterator[Callable[[str], Worker]]:
    """Start a process that contends for the lease of the work, ready to go."""
    environment = os.environ | {"PYTHONPATH": str(Path(modelserve.__file__).parents[1])}
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:

        def start(task: str) -> Worker:
            command = [sys.executable, "-W", "error", "-m", "tests.stores.lease_worker", task, registry_url]
            worker = stack.enter_context(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True))
            stack.callback(worker.kill)
            assert line(worker) == "ready"
            return worker

        yield start


def line(worker: Worker) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def go(worker: Worker) -> None:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()


def a_term_later(connection: sa.Connection) -> dt.datetime:
    return clock.now(connection) + dt.timedelta(seconds=TERM_S)


def test_processes_that_contend_never_hold_it_together(database: Database, start: Callable[[str], Worker]) -> None:
    """Three processes hold it ten times each: the rows of a holder lie side by side, and tokens only rise."""
    workers = [start("contend") for _ in range(3)]
    for worker in workers:
        go(worker)
    assert [line(worker) for worker in workers] == ["done"] * 3
    written = work(database)
    assert written == sorted(written)
    assert [written.count(token) for token in sorted(set(written))] == [3] * 30


def test_a_frozen_holder_is_replaced_and_fenced_off(database: Database, start: Callable[[str], Worker]) -> None:
    """A process that is stopped loses the lease when its term has passed; when it goes on, its write is refused."""
    holder = start("hold")
    go(holder)
    assert line(holder) == "written"
    os.kill(holder.pid, signal.SIGSTOP)
    assert contender(database, "early").acquire("work", TERM_S) is None
    second = contender(database, "next", a_term_later).acquire("work", TERM_S)
    assert second is not None
    lease_worker.write(database, second)
    os.kill(holder.pid, signal.SIGCONT)
    go(holder)
    assert [line(holder), line(holder)] == ["lost", "not renewed"]
    assert work(database) == [second.token - 1, second.token]


def test_a_killed_holder_is_replaced_within_its_term(database: Database, start: Callable[[str], Worker]) -> None:
    """A process that is killed keeps nothing but the rest of its term."""
    holder = start("hold")
    go(holder)
    assert line(holder) == "written"
    holder.kill()
    holder.wait(30)
    assert contender(database, "early").acquire("work", TERM_S) is None
    assert contender(database, "next", a_term_later).acquire("work", TERM_S) is not None


@pytest.mark.parametrize("registry_url", ["postgresql"], indirect=True)
@pytest.mark.postgres
def test_a_holder_frozen_in_its_transaction_is_rolled_back(database: Database, start: Callable[[str], Worker]) -> None:
    """PostgreSQL ends its transaction when it has stood still for the term: it keeps neither the lease nor the rows."""
    holder = start("freeze")
    go(holder)
    assert line(holder) == "written"
    os.kill(holder.pid, signal.SIGSTOP)
    pause, leases, second = threading.Event(), contender(database, "next"), None
    for _ in range(1500):
        if second := leases.acquire("work", TERM_S):
            break
        pause.wait(0.02)
    assert second is not None
    os.kill(holder.pid, signal.SIGCONT)
    go(holder)
    assert line(holder) == "rolled back"
    assert work(database) == []


@pytest.mark.parametrize("registry_url", ["postgresql"], indirect=True)
@pytest.mark.postgres
def test_renewing_does_not_wait_for_a_write_and_acquiring_passes_by(database: Database) -> None:
    """While a fenced transaction is open the holder renews, and no other process acquires, even after the term."""
    one = contender(database, "one")
    lease = one.acquire("work", TERM_S)
    assert lease is not None
    with database.write() as connection:
        fence(connection, lease)
        one.renew(lease)
        assert contender(database, "two", a_term_later).acquire("work", TERM_S) is None
    assert contender(database, "two", a_term_later).acquire("work", TERM_S) is not None


# -- accounts that only read -------------------------------------------------------------------------------


def test_an_account_that_only_reads_gets_none_and_says_so_once(
    registry_url: str, database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked once, logs one warning that names the right, and stays off."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(read_only(registry_url, database, tmp_path))
        leases = stack.enter_context(Leases(Database(url)))
        assert [leases.acquire("work", TERM_S) for _ in range(3)] == [None] * 3
        assert leases.off
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("leases unavailable until restart: grant SELECT, INSERT, UPDATE on lease in ")


@contextlib.contextmanager
def read_only(url: str, database: Database, folder: Path) -> Iterator[str]:
    """Yield the URL of an account that may only read."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(folder / "models.db")) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
        yield f"sqlite:///file:{folder / 'models.db'}?mode=ro&uri=true"
        return
    with database.write() as connection:
        connection.execute(sa.text("DROP ROLE IF EXISTS looker"))
        connection.execute(sa.text("CREATE ROLE looker LOGIN"))
        connection.execute(sa.text("GRANT SELECT ON modelserve_alembic_version, lease TO looker"))
    yield url.replace("postgres@", "looker@")
    with database.write() as connection:
        connection.execute(sa.text("DROP OWNED BY looker"))
        connection.execute(sa.text("DROP ROLE looker"))


# -- whatever happens --------------------------------------------------------------------------------------


class Contention(RuleBasedStateMachine):
    """Three processes that acquire, renew, write, release and freeze, beside a clock that runs and jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.database = Database("sqlite://")
        with self.database.write() as connection:
            connection.execute(sa.text("CREATE TABLE work (id INTEGER PRIMARY KEY, token INTEGER NOT NULL)"))
        self.contenders = [contender(self.database, str(number), self.clock) for number in range(3)]
        self.believed: dict[int, Lease] = {}
        self.last: tuple[int, int] | None = None  # the holder, and its token
        self.until = NOON
        self.renewed_at = NOON

    def teardown(self) -> None:
        """Close the database."""
        self.database.close()

    @property
    def is_free(self) -> bool:
        """Whether the next process gets it: released, lapsed, or from a time yet to come."""
        now = self.clock.time
        return self.last is None or now >= self.until or self.renewed_at - now > self.until - self.renewed_at

    def begin_term(self, term_s: float) -> None:
        """Note the term that begins now."""
        self.renewed_at, self.until = self.clock.time, self.clock.time + dt.timedelta(seconds=term_s)

    @rule(who=st.integers(0, 2), term_s=st.sampled_from([5.0, 30.0]))
    def acquire(self, who: int, term_s: float) -> None:
        """Get it exactly when it is free, with a token higher than any before."""
        highest = max((lease.token for lease in self.believed.values()), default=0)
        was_free, lease = self.is_free, self.contenders[who].acquire("work", term_s)
        assert (lease is not None) == was_free
        if lease is not None:
            assert lease.token > highest
            self.believed[who], self.last = lease, (who, lease.token)
            self.begin_term(term_s)

    @rule(who=st.integers(0, 2))
    def renew(self, who: int) -> None:
        """Succeed exactly for the last holder."""
        if lease := self.believed.get(who):
            if self.last == (who, lease.token):
                self.contenders[who].renew(lease)
                self.begin_term(lease.term_s)
            else:
                with pytest.raises(LeaseLost):
                    self.contenders[who].renew(lease)

    @rule(who=st.integers(0, 2))
    def write(self, who: int) -> None:
        """Write exactly as the last holder, however long the others believe in their leases."""
        if lease := self.believed.get(who):
            expected = "written" if self.last == (who, lease.token) else "lost"
            assert lease_worker.attempt(self.database, lease) == expected

    @rule(who=st.integers(0, 2))
    def release(self, who: int) -> None:
        """Free it, if it is this one's."""
        if lease := self.believed.get(who):
            self.contenders[who].release(lease)
            if self.last == (who, lease.token):
                self.last = None

    @rule(seconds=st.sampled_from([1.0, 4.0, 5.0, 29.0, 30.0, 86_400.0, -1.0, -10.0, -3600.0]))
    def pass_time(self, seconds: float) -> None:
        """Let time pass, or the clock jump."""
        self.clock.advance(seconds)

    @invariant()
    def tokens_of_writes_only_rise(self) -> None:
        """No write of an earlier holder lies behind one of a later."""
        written = work(self.database)
        assert written == sorted(written)


TestContention = Contention.TestCase
TestContention.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
