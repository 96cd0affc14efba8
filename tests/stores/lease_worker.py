"""A process that contends for a lease: ``lease_worker TASK URL``. It prints a line for each step."""

from __future__ import annotations

import sys

import sqlalchemy as sa

from modelserve.database.engine import Database
from modelserve.errors import BackendUnavailable, LeaseLost
from modelserve.stores.leases import Lease, Leases, fence

ROUNDS = 10


def write(database: Database, lease: Lease) -> None:
    """Add a row under the lease."""
    with database.write() as connection:
        fence(connection, lease)
        connection.execute(sa.text("INSERT INTO work (token) VALUES (:token)"), {"token": lease.token})


def attempt(database: Database, lease: Lease) -> str:
    """Return what became of a write."""
    try:
        write(database, lease)
    except LeaseLost:
        return "lost"
    return "written"


def hold(database: Database, leases: Leases) -> None:
    """Acquire and write; after the next line write again, and try to renew."""
    lease = leases.acquire("work", 30)
    assert lease is not None
    print(attempt(database, lease), flush=True)
    sys.stdin.readline()
    print(attempt(database, lease), flush=True)
    try:
        leases.renew(lease)
    except LeaseLost:
        print("not renewed", flush=True)


def freeze(database: Database, leases: Leases) -> None:
    """Acquire and write, and wait for a line before the commit."""
    lease = leases.acquire("work", 0.3)
    assert lease is not None
    try:
        with database.write() as connection:
            fence(connection, lease)
            connection.execute(sa.text("INSERT INTO work (token) VALUES (:token)"), {"token": lease.token})
            print("written", flush=True)
            sys.stdin.readline()
            connection.execute(sa.text("INSERT INTO work (token) VALUES (:token)"), {"token": lease.token})
    except BackendUnavailable:
        print("rolled back", flush=True)


def contend(database: Database, leases: Leases) -> None:
    """Hold the lease ten times, and write three rows each time."""
    held = 0
    while held < ROUNDS:
        lease = leases.acquire("work", 30)
        if lease is not None:
            for _ in range(3):
                write(database, lease)
            leases.release(lease)
            held += 1
    print("done", flush=True)


TASKS = {task.__name__: task for task in (hold, freeze, contend)}

if __name__ == "__main__":
    rows = Database(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    TASKS[sys.argv[1]](rows, Leases(rows, shared=True))
    rows.close()
