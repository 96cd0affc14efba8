"""The same server for hosts without an event loop: threads, forks, lifecycle, and leaving the process as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import modelserve as ms
from modelserve.testing.models import tells, telltale

X = np.array([[1.0], [2.0]])


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with the model ``m`` in production."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", telltale(1), example=X)
    registry.promote("m", "1")
    return registry


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a host program of its own in ``folder``; warnings are errors there too."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_threads_share_one_server(registry: ms.Registry, tmp_path: Path) -> None:
    """Calls from many threads are each answered with their own result."""
    with ms.ModelServer(registry, cache_dir=tmp_path / "cache") as server, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda i: server.predict("m", {"x": [float(i)]}), range(500)))
        assert [tells(answer.prediction, i) for i, answer in enumerate(answers)] == [1] * 500
        many = server.predict_many("m", [{"x": [1.0]}, {"x": [2.0]}])
        assert [answer.prediction for answer in many] == pytest.approx([1001.0, 1002.0])
        assert server.ready
        assert server.status()[0].production == "1"


def test_errors_reach_the_calling_thread(registry: ms.Registry, tmp_path: Path) -> None:
    """Errors are the same typed ones as in the async server."""
    with ms.ModelServer(registry, cache_dir=tmp_path / "cache") as server:
        with pytest.raises(ms.InvalidInput):
            server.predict("m", {"x": "no"})
        with pytest.raises(ms.ModelNotFound):
            server.predict("nobody", {})


def test_start_and_close_may_be_repeated(registry: ms.Registry, tmp_path: Path) -> None:
    """Starting a started server and closing a closed one do nothing; a closed one can be started again."""
    server = ms.ModelServer(registry, cache_dir=tmp_path / "cache")
    with pytest.raises(ms.NotReady, match="not started"):
        server.predict("m", {"x": [1.0]})
    for _ in range(2):
        server.start()
        server.start()
        assert server.predict("m", {"x": [1.0]}).model_version == "1"
        server.close()
        server.close()


def test_calls_that_race_with_a_close_are_answered(registry: ms.Registry, tmp_path: Path) -> None:
    """Every call that races with a close gets its answer or ``NotReady``; none hangs, none gets a foreign error."""
    with ThreadPoolExecutor(24) as threads:
        for _ in range(5):
            server = ms.ModelServer(registry, cache_dir=tmp_path / "cache")
            server.start()
            calls = [threads.submit(server.predict, "m", {"x": [float(i)]}) for i in range(300)]
            closes = [threads.submit(server.close) for _ in range(3)]
            for i, call in enumerate(calls):
                error = call.exception(timeout=30)
                assert isinstance(error, ms.NotReady) or tells(call.result().prediction, i) == 1
            assert [close.exception(timeout=30) for close in closes] == [None] * 3


def test_a_second_start_waits_for_the_first(registry: ms.Registry, tmp_path: Path) -> None:
    """Whoever starts a server finds it ready afterwards, even if another thread had begun to start it."""
    server = ms.ModelServer(registry, cache_dir=tmp_path / "cache")

    def start() -> bool:
        server.start()
        return server.ready

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: start(), range(4))) == [True] * 4
    server.close()


def test_a_forked_copy_of_a_started_server_says_so(registry: ms.Registry, tmp_path: Path) -> None:
    """In a child made by fork, the parent's server refuses in one clear sentence instead of hanging."""
    result = run_script(
        f"""
        import os, warnings
        import modelserve as ms
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork beside threads
        server = ms.ModelServer(ms.Registry("sqlite:///{tmp_path}/models.db"), cache_dir="{tmp_path}/cache")
        server.start()
        if os.fork() == 0:
            try:
                server.predict("m", {{"x": [1.0]}})
            except ms.ModelServeError as error:
                print(type(error).__name__, error, flush=True)
            os._exit(0)
        os.wait()
        print(server.predict("m", {{"x": [1.0]}}).prediction)
        server.close()
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "ForkedServer this server was started in process" in result.stdout
    assert "start it after the fork" in result.stdout
    assert "1001" in result.stdout


def test_a_server_made_before_a_fork_starts_after_it(registry: ms.Registry, tmp_path: Path) -> None:
    """A server and a registry made (and the registry used) before a fork work in every child."""
    result = run_script(
        f"""
        import os
        import modelserve as ms
        registry = ms.Registry("sqlite:///{tmp_path}/models.db")
        registry.production("m")
        server = ms.ModelServer(registry, cache_dir="{tmp_path}/cache")
        for _ in range(2):
            if os.fork() == 0:
                with server:
                    print(server.predict("m", {{"x": [1.0]}}).prediction, flush=True)
                os._exit(0)
        print(sorted(os.wait()[1] for _ in range(2)))
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("1001") == 2
    assert "[0, 0]" in result.stdout


def test_a_host_that_forgets_to_close_still_ends(registry: ms.Registry, tmp_path: Path) -> None:
    """A script that leaves its server open ends by itself, without a traceback."""
    result = run_script(
        f"""
        import modelserve as ms
        server = ms.ModelServer(ms.Registry("sqlite:///{tmp_path}/models.db"), cache_dir="{tmp_path}/cache")
        server.start()
        print(server.predict("m", {{"x": [1.0]}}).model_version)
        """,
        tmp_path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


def test_serving_changes_nothing_global(registry: ms.Registry, tmp_path: Path) -> None:
    """Importing, serving and closing leave signals, environment, logging, threads and the rest as they were."""
    result = run_script(
        f"""
        import logging, multiprocessing, os, signal, sys, threading, warnings

        def state():
            return {{
                "signals": [signal.getsignal(each) for each in signal.valid_signals()],
                "environment": dict(os.environ),
                "handlers": list(logging.getLogger().handlers),
                "level": logging.getLogger().level,
                "ours": (logging.getLogger("modelserve").handlers, logging.getLogger("modelserve").level),
                "filters": list(warnings.filters),
                "start method": multiprocessing.get_start_method(allow_none=True),
                "directory": os.getcwd(),
                "threads": threading.active_count(),
                "interval": sys.getswitchinterval(),
                "hook": sys.excepthook,
                "descriptors": len(os.listdir("/dev/fd")),
            }}

        import asyncio.runners, sklearn.linear_model, skops.io, sqlalchemy.dialects.sqlite  # these are others'
        before = state()
        import modelserve as ms
        with ms.ModelServer(ms.Registry("sqlite:///{tmp_path}/models.db"), cache_dir="{tmp_path}/cache") as server:
            server.predict("m", {{"x": [1.0]}})
        for thread in threading.enumerate():
            if thread.name.startswith("modelserve"):
                thread.join(10)  # told to end, and on its way
        after = state()
        print([name for name in before if before[name] != after[name]])
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import modelserve", "numpy sqlalchemy pydantic fsspec alembic asyncio sklearn modelserve.server"),
        (
            "import modelserve; modelserve.Registry",
            "sklearn skops joblib pandas alembic modelserve.server modelserve.http",
        ),
        ("import modelserve.server", "sklearn skops joblib pandas alembic torch tensorflow modelserve.http"),
        ("import modelserve.execution.pool", "sqlalchemy pydantic fsspec alembic sklearn modelserve.registry"),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, absent: str, tmp_path: Path) -> None:
    """No framework, driver or upper room is imported before it is used."""
    script = f"import sys\n{statement}\nprint([name for name in {absent.split()!r} if name in sys.modules])"
    result = run_script(script, tmp_path)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_a_host_whose_threads_have_small_stacks_is_served(registry: ms.Registry, tmp_path: Path) -> None:
    """A model gets the stack that numerical libraries need; threads of the host keep the size that it has set."""
    script = """
        import threading
        threading.stack_size(64 << 10)
        import modelserve as ms
        options = {"m": ms.ModelOptions(timeout_ms=30_000)}
        with ms.ModelServer(ms.Registry("sqlite:///models.db"), options, cache_dir="cache") as server:
            print(server.predict("m", {"x": [1.0]}).model_version, threading.stack_size())
    """
    ended = run_script(script, tmp_path)
    assert ended.stdout.split() == ["1", str(64 << 10)], ended.stderr
