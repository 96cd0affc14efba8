"""``modelserve log prune``, over SQLite."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from typer.testing import CliRunner, Result

from modelserve.cli.commands import app
from modelserve.ids import uuid7_source
from modelserve.registry import Registry
from modelserve.types import LogRecord

Invoke: TypeAlias = Callable[..., Result]
NOW = dt.datetime.now(dt.UTC)
new_id = uuid7_source()


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run one command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["log", *arguments], catch_exceptions=False)

    return invoke


def fill(url: str | None = None) -> None:
    """Log an answer of each of two models at each of ten days."""
    with Registry("sqlite:///models.db") as registry, registry.inference_log(url) as log:
        log.append([_record(name, days) for name in ("churn", "fraud") for days in range(10)])


def _record(name: str, days: int) -> LogRecord:
    return LogRecord(
        id=new_id(),
        request_id="r",
        row_index=0,
        model_name=name,
        version="1",
        input_hash=None,
        inputs=None,
        prediction="1",
        error=None,
        latency_ms=1.0,
        cached=False,
        degraded=None,
        shadow=False,
        occurred_at=NOW - dt.timedelta(days=days, hours=1),
    )


def test_old_records_are_removed(invoke: Invoke) -> None:
    """The number is told, for a dry run before anything goes; one model or all of them."""
    fill()
    assert invoke("prune", "--older-than", "7d", "--dry-run").output == "6 records would be removed\n"
    assert invoke("prune", "--older-than", "7d", "--model", "churn").output == "3 records were removed\n"
    assert invoke("prune", "--older-than", "5d").output == "7 records were removed\n"
    assert invoke("prune", "--older-than", "5d").output == "0 records were removed\n"


def test_a_log_elsewhere_is_pruned_there(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting ``log`` says which database is meant."""
    fill()
    fill("sqlite:///log.db")
    monkeypatch.setenv("MODELSERVE_LOG", "sqlite:///log.db")
    assert invoke("prune", "--older-than", "0s").output == "20 records were removed\n"
    monkeypatch.delenv("MODELSERVE_LOG")
    assert invoke("prune", "--older-than", "0s", "--dry-run").output == "20 records would be removed\n"


def test_a_time_must_be_given(invoke: Invoke) -> None:
    """Nothing is removed without saying how old it must be, in a unit."""
    assert invoke("prune").exit_code == 2
    assert invoke("prune", "--older-than", "30").exit_code == 2


def test_a_time_before_all_times_is_refused(invoke: Invoke) -> None:
    """What is longer than anybody keeps a log is a slip, and told as one."""
    fill()
    result = invoke("prune", "--older-than", "800000d")
    assert result.exit_code == 2
    assert "hundred years" in result.output
