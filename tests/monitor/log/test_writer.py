"""The writer: nothing it was given goes missing without being counted, whatever the database does."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from modelserve.config import ModelOptions
from modelserve.errors import ConfigError, InvalidInput
from modelserve.events import VersionUnloaded
from modelserve.monitor.log.writer import InferenceLog, log_key_of
from modelserve.types import LogStatus
from tests.monitor.answers import Store, served

EVERYTHING = {"m": ModelOptions(log_sample_rate=1.0)}
Open = Callable[..., InferenceLog]


@pytest.fixture
def open_log(store: Store) -> Iterator[Open]:
    """Start logs that are stopped with the test."""
    logs = []

    def start(models: dict[str, ModelOptions] | None = EVERYTHING, **options: object) -> InferenceLog:
        log = InferenceLog(store, models, **{"flush_s": 0.01} | options)  # type: ignore[arg-type]
        logs.append(log)
        log.start()
        return log

    yield start
    store.down.clear()
    for log in logs:
        stop(log)


def stop(log: InferenceLog, limit_s: float = 20) -> None:
    asyncio.run(log.stop(limit_s))


def adds_up(status: LogStatus) -> bool:
    return status.sampled == status.written + status.dropped + status.refused + status.waiting


@pytest.mark.promise("P3")
def test_stopping_writes_everything(store: Store, open_log: Open) -> None:
    """A graceful stop loses nothing: each row that was sampled is in the database, once."""
    log = open_log(flush_s=3600)
    for i in range(700):
        log(served(f"r{i}", rows=1 + i % 3))
    stop(log)
    status = log.status()
    assert status == LogStatus(sampled=1399, written=1399, dropped=0, refused=0, waiting=0, problem=None)
    assert len(store.records) == 1399
    assert store.closed


def test_records_are_written_soon_without_a_stop(store: Store, open_log: Open) -> None:
    """A record waits no longer than the time told, and a full batch does not wait for it."""
    log = open_log()
    log(served("one"))
    store.wait(lambda: len(store.records) == 1)
    patient = open_log(flush_s=3600)
    for i in range(1000):
        patient(served(f"r{i}"))
    store.wait(lambda: len(store.records) > 1)


def test_the_sample_follows_the_options_of_each_model(store: Store, open_log: Open) -> None:
    """Nothing of one model, all of another, a tenth of what has no options; failures are sampled alike."""
    log = open_log({"none": ModelOptions(log_sample_rate=0), "all": ModelOptions(log_sample_rate=1)})
    for i in range(2000):
        for name in ("none", "all", "other"):
            error = InvalidInput("x", "missing") if i % 2 else None
            inputs, values = ((), ()) if error else (served().inputs, served().values)
            log(served(f"{name}{i}", model_name=name, error=error, inputs=inputs, values=values))
    stop(log)
    kept = [record.model_name for record in store.records.values()]
    assert kept.count("none") == 0
    assert kept.count("all") == 2000
    assert 120 < kept.count("other") < 280
    assert sum(record.error is not None for record in store.records.values() if record.model_name == "all") == 1000


def test_production_and_shadow_rows_pair_up(store: Store, open_log: Open) -> None:
    """Two processes that see the same request, one as a shadow, keep it both or leave it both."""
    options = {"m": ModelOptions(log_sample_rate=0.3)}
    production, shadow = open_log(options), open_log(options)
    for i in range(1000):
        production(served(f"r{i}"))
        shadow(served(f"r{i}", version="2", arm="shadow"))
    stop(production)
    stop(shadow)
    seen = [{r.request_id for r in store.records.values() if r.shadow == side} for side in (False, True)]
    assert seen[0] == seen[1]
    assert 200 < len(seen[0]) < 400


@pytest.mark.promise("P3")
def test_a_database_that_comes_back_gets_everything_once(
    store: Store, open_log: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Records wait while the database is away, are written when it is back, and it is told once at each end."""
    store.down.set()
    log = open_log()
    for i in range(50):
        log(served(f"r{i}"))
    store.wait(lambda: store.attempts >= 3)
    assert "it is down" in (log.status().problem or "")
    store.down.clear()
    store.wait(lambda: len(store.records) == 50)
    stop(log)
    assert log.status().written == 50
    assert [record.getMessage() for record in caplog.records] == [
        "inference log: inference log is unavailable: it is down; records wait, up to the bound",
        "inference log: records are written again",
    ]


@pytest.mark.promise("P3")
def test_beyond_the_bound_records_are_dropped_and_counted(store: Store, open_log: Open) -> None:
    """While the database is away no more than the bound waits, in rows or in bytes; the rest is counted."""
    store.down.set()
    for bound in ({"max_rows": 20}, {"max_bytes": 20_000}):
        log = open_log(**bound)
        for i in range(500):
            log(served(f"r{i}", rows=2))
        status = log.status()
        assert status.dropped > 400
        assert status.waiting <= 200
        assert adds_up(status)
    assert status.sampled == 1000


@pytest.mark.promise("P3")
def test_a_failure_that_waits_does_not_keep_its_request(store: Store, open_log: Open) -> None:
    """Of an error its words wait, not the frames that it came through, with whatever a client sent in them."""
    store.down.set()
    log = open_log()
    error = InvalidInput("x", "missing")
    gone = weakref.ref(error)
    log(served("r", inputs=(), values=(), error=error))
    del error
    gc.collect()
    assert gone() is None
    store.down.clear()
    store.wait(lambda: len(store.records) == 1)
    (record,) = store.records.values()
    assert record.error == "InvalidInput: x: missing"


def test_a_request_without_room_is_told_with_its_rows(
    store: Store, open_log: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """One request of more rows than may wait is dropped and counted, and the log says how many they were."""
    log = open_log(max_rows=20)
    log(served("r", rows=21))
    assert log.status().dropped == 21
    assert "21 rows had no room in the buffer (more is sampled than can be written)" in caplog.text


@pytest.mark.promise("P3")
def test_a_stop_without_a_database_ends_and_counts(
    store: Store, open_log: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be written within the limit is dropped, counted and told; closing does not wait for ever."""
    store.down.set()
    log = open_log()
    for i in range(2500):
        log(served(f"r{i}"))
    stop(log, limit_s=0.3)
    status = log.status()
    assert (status.dropped, status.waiting) == (2500, 0)
    assert adds_up(status)
    assert "2500 rows could not be written before the end" in caplog.text


def test_a_database_that_never_answers_does_not_hold_up_the_end(store: Store, open_log: Open) -> None:
    """A call that does not return is left behind; everything that waited behind it counts as dropped."""
    hanging, answers = threading.Event(), threading.Event()

    def hang(_: object) -> bool:
        hanging.set()
        return not answers.wait(20)

    store.refused = hang
    log = open_log()
    log(served("first"))
    assert hanging.wait(20)
    for i in range(10):
        log(served(f"r{i}"))
    stop(log, limit_s=0.05)
    assert log.status().dropped == 10
    answers.set()
    log._thread.join(20)
    assert adds_up(log.status())


def test_one_bad_record_does_not_cost_the_others(
    store: Store, open_log: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A record that the database cannot hold is left out and counted; those around it are written."""
    store.refused = lambda record: record.request_id in {"r7", "r400"}
    log = open_log(flush_s=3600)
    for i in range(500):
        log(served(f"r{i}"))
    stop(log)
    assert log.status().refused == 2
    assert len(store.records) == log.status().written == 498
    assert caplog.text.count("was refused") == 1


def test_a_value_that_nobody_foresaw_does_not_end_the_log(store: Store, open_log: Open) -> None:
    """A record that cannot even be made counts as refused, and the next one is written."""
    log = open_log()
    log(served("odd", inputs=[("not", "a", "row")]))
    log(served("good"))
    stop(log)
    assert [record.request_id for record in store.records.values()] == ["good"]
    assert log.status().refused == 1


def test_an_account_that_may_not_write_turns_off_a_log_that_nobody_asked_for(
    store: Store, open_log: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The default place is given up, once and with the ways out; the server is told."""
    store.allowed = False
    off = threading.Event()
    log = open_log(optional=True, turned_off=off.set)
    log(served("one"))
    assert off.wait(20)
    stop(log)
    assert store.attempts == 0
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "grant INSERT" in caplog.text
    assert adds_up(log.status())


def test_an_account_that_may_not_write_where_it_was_told_to_is_tried_again(store: Store, open_log: Open) -> None:
    """A place that was asked for is not given up: a right that is granted later is used."""
    store.allowed = False
    log = open_log()
    log(served("one"))
    assert store.asked.wait(20)
    store.allowed = True
    store.wait(lambda: len(store.records) == 1)


def test_a_version_that_was_freed_is_forgotten(store: Store, open_log: Open) -> None:
    """What is kept of a version for its records goes with it, and another of the same name starts anew."""
    log = open_log()
    log(served("one"))
    log(VersionUnloaded("m", "1"))
    assert not log._makers
    log(served("two", sha256="cd" * 32))
    stop(log)
    hashes = {record.input_hash for record in store.records.values()}
    assert len(hashes) == 2


def test_a_short_key_is_refused() -> None:
    """A key that can be found by trying protects nothing."""
    assert log_key_of(None) is None
    assert log_key_of("0123456789abcdef") == b"0123456789abcdef"
    with pytest.raises(ConfigError, match="log_key"):
        log_key_of("secret")
    with pytest.raises(ConfigError, match="log_key: expected a text"):
        log_key_of(b"0123456789abcdef")  # type: ignore[arg-type]
