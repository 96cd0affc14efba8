"""Worker processes under every kind of host: scripts, notebooks, gunicorn, uvicorn, and hosts that die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import nbformat
import numpy as np
import pytest

import modelserve as ms
from tests.hosts.estimators import Stubborn
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
LIMIT_S = 50.0
X = np.array([[5.0], [6.0]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a registry whose model ``m`` doubles."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", Stubborn(), example=X, framework="sklearn", format="joblib")
    registry.promote("m", "1")
    return tmp_path


SETUP = """
import modelserve as ms
registry = ms.Registry("sqlite:///{folder}/models.db")
options = ms.ModelOptions(executor="process", replicas=2, allow_pickle=True)
settings = dict(models={{"m": options}}, cache_dir="{folder}/cache")
"""


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a host; its workers inherit the mark that they are found by."""
    return os.environ | {"PYTHONPATH": str(ROOT), "TEST_HOST_FOLDER": str(folder)}


def program(folder: Path, text: str, name: str = "host.py") -> Path:
    path = folder / name
    path.write_text(SETUP.format(folder=folder) + text, encoding="utf-8")
    return path


def run(folder: Path, path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path)],
        env=environment(folder),
        cwd=cwd or folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def workers(folder: Path) -> list[int]:
    """Return the living workers of the hosts that were started for this folder."""
    listed = subprocess.run(["ps", "-axeww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True)
    return [
        int(line.split()[0])
        for line in listed.stdout.splitlines()
        if "modelserve.execution.worker" in line
        and f"TEST_HOST_FOLDER={folder}" in line
        and not line.split()[1].startswith("Z")
    ]


def eventually(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


# -- scripts and notebooks ---------------------------------------------------------------------------------


def test_a_script_without_a_main_guard(folder: Path) -> None:
    """A script that serves at its top level runs once, answers, ends by itself and leaves no worker."""
    path = program(
        folder,
        """
print("top level")
with ms.ModelServer(registry, **settings) as server:
    print(server.predict("m", {"x": [21.0]}).prediction)
""",
    )
    done = run(folder, path)
    assert done.stdout.split() == ["top", "level", "42.0"], done.stderr
    assert done.returncode == 0
    assert workers(folder) == []


def test_a_script_whose_models_come_from_a_module_beside_it(folder: Path) -> None:
    """A worker finds modules where the host does, and does not look into the current folder on its own account."""
    (folder / "beside.py").write_text(
        "from tests.hosts.estimators import Stubborn\nclass Mine(Stubborn): pass\n", encoding="utf-8"
    )
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "random.py").write_text("raise RuntimeError('this is not the random you want')\n", encoding="utf-8")
    path = program(
        folder,
        """
import beside
registry.register("m", "2", beside.Mine(), example=[[5.0]], framework="sklearn", format="joblib")
registry.promote("m", "2")
with ms.ModelServer(registry, **settings) as server:
    print(server.predict("m", {"x": [21.0]}))
""",
    )
    done = run(folder, path, cwd=elsewhere)
    assert "prediction=42.0, model_version='2'" in done.stdout, done.stderr


def test_a_model_whose_class_lives_in_the_script_is_refused_in_one_sentence(folder: Path) -> None:
    """What only the script itself has cannot be loaded by a worker; the reason says where to move it."""
    path = program(
        folder,
        """
from tests.hosts.estimators import Stubborn
class Mine(Stubborn): pass
try:
    registry.register("m", "2", Mine(), example=[[5.0]], framework="sklearn", format="joblib")
    registry.promote("m", "2")
except ms.ModelServeError as error:
    print("refused:", error)
with ms.ModelServer(registry, **settings) as server:
    print("status:", server.status()[0].problem)
""",
    )
    done = run(folder, path)
    assert done.returncode == 0, done.stderr
    assert "define it in a module" in done.stdout


def test_a_notebook(folder: Path) -> None:
    """Both faces work in a notebook, whose cells run in an event loop of their own."""
    notebook = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    cells = (
        SETUP.format(folder=folder),
        "server = ms.AsyncModelServer(registry, **settings)\nawait server.start()",
        "print((await server.predict('m', {'x': [21.0]})).prediction)\nawait server.close()",
        "with ms.ModelServer(registry, **settings) as server:\n    print(server.predict('m', {'x': [4.0]}).prediction)",
    )
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]  # type: ignore[no-untyped-call]
    nbformat.write(notebook, folder / "host.ipynb")  # type: ignore[no-untyped-call]
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", "host.ipynb"]
    done = subprocess.run(
        command, env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "42.0" in done.stdout
    assert "8.0" in done.stdout
    assert workers(folder) == []


# -- web servers -------------------------------------------------------------------------------------------

FLASK = """
import os
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware
server = ms.ModelServer(registry, **settings)
app = Flask(__name__)
app.route("/process")(lambda: str(os.getpid()))
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/ml": ms.wsgi(server)})
"""
ASGI = """
app = ms.asgi(ms.AsyncModelServer(registry, **settings))
"""


@contextlib.contextmanager
def web(folder: Path, arguments: list[str]) -> Iterator[httpx.Client]:
    """Run a web server on a free port (``PORT``) until it answers; end it with SIGTERM and wait for its workers."""
    port = str(free_port())
    command = [sys.executable, "-m", *(each.replace("PORT", port) for each in arguments)]
    log = (folder / "log").open("w+", encoding="utf-8")
    with log, subprocess.Popen(command, env=environment(folder), cwd=folder, stdout=log, stderr=log) as host:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                yield client
        finally:
            host.terminate()
            host.wait(LIMIT_S)
    eventually(lambda: workers(folder) == [], "workers outlived their host")


def predict(client: httpx.Client, path: str, x: float) -> httpx.Response | None:
    with contextlib.suppress(httpx.TransportError):
        return client.post(path, json={"inputs": {"x": [x]}})
    return None


def answers(client: httpx.Client, path: str) -> bool:
    response = predict(client, path, 21.0)
    return response is not None and response.status_code == 200 and response.json()["prediction"] == 42.0


def test_gunicorn_with_preload(folder: Path) -> None:
    """A server that was made before the fork and is started after it has workers in each gunicorn worker."""
    program(folder, FLASK)
    arguments = ["gunicorn", "--preload", "-w", "2", "-b", "127.0.0.1:PORT", "host:app"]
    with web(folder, arguments) as client:
        eventually(lambda: answers(client, "/ml/predict/m"), (folder / "log").read_text(encoding="utf-8"))
        eventually(lambda: answers(client, "/ml/predict/m") and len(workers(folder)) == 4, "not all have workers")


def test_a_server_started_before_the_fork_says_so(folder: Path) -> None:
    """A forked copy of a started server answers with an error at once, and its log says what to do."""
    program(folder, FLASK + "server.start()\n")
    arguments = ["gunicorn", "--preload", "-w", "1", "-b", "127.0.0.1:PORT", "host:app"]
    with web(folder, arguments) as client:
        eventually(lambda: predict(client, "/ml/predict/m", 21.0) is not None, "gunicorn does not answer")
        response = predict(client, "/ml/predict/m", 21.0)
        assert response is not None
        assert response.status_code == 500
    assert "start it after the fork" in (folder / "log").read_text(encoding="utf-8")


def test_gunicorn_with_greenlets(folder: Path) -> None:
    """Under gevent, which patches the whole process, the WSGI face answers from worker processes."""
    program(folder, FLASK)
    with web(folder, ["gunicorn", "-k", "gevent", "-w", "1", "-b", "127.0.0.1:PORT", "host:app"]) as client:
        eventually(lambda: answers(client, "/ml/predict/m"), (folder / "log").read_text(encoding="utf-8"))
        assert len(workers(folder)) == 2


GREEN = """
import gevent
for executor in ("thread", "process"):
    settings["models"] = {"m": options.model_copy(update={"executor": executor, "timeout_ms": 30_000})}
    with ms.ModelServer(registry, **settings) as server:
        asking = [gevent.spawn(server.predict, "m", {"x": [float(i)]}) for i in range(2, 100)]
        turns = 0
        while not all(map(gevent.Greenlet.ready, asking)):
            gevent.sleep()
            turns += 1
        assert [each.get().prediction for each in asking] == [2.0 * i for i in range(2, 100)]
        assert turns > 1
print("answered")
"""


def test_a_host_of_greenlets(folder: Path) -> None:
    """With gevent's patches the server answers greenlets, from a thread and from a process, and lets others run."""
    path = program(folder, GREEN)
    path.write_text(
        "from gevent import monkey\nmonkey.patch_all()\n" + path.read_text(encoding="utf-8"), encoding="utf-8"
    )
    ended = run(folder, path)
    assert ended.stdout.split() == ["answered"], ended.stderr


@pytest.mark.parametrize("half", ["patch_all(thread=False)", "patch_all(select=False)", "patch_thread()"])
def test_a_host_that_is_half_of_greenlets_is_refused(folder: Path, half: str) -> None:
    """Threads that wait for greenlets, or greenlets that wait like threads, would never start: an error says so."""
    path = program(folder, "ms.ModelServer(registry, **settings).start()\n")
    path.write_text(f"from gevent import monkey\nmonkey.{half}\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    ended = run(folder, path)
    assert "ConfigError: gevent has patched other modules, but not" in ended.stderr


def test_uvicorn_with_several_workers(folder: Path) -> None:
    """Each uvicorn worker has worker processes of its own."""
    program(folder, ASGI)
    with web(folder, ["uvicorn", "--workers", "2", "--port", "PORT", "host:app"]) as client:
        eventually(lambda: answers(client, "/predict/m") and len(workers(folder)) == 4, "not all have workers")


# -- hosts that end ----------------------------------------------------------------------------------------

ENDLESS = """
import threading
server = ms.ModelServer(registry, **settings)
server.start()
def ask():
    try:
        server.predict("m", {"x": [float(XX)]}, timeout_ms=1e6)
    except Exception:
        pass
for _ in range(2):
    threading.Thread(target=ask, daemon=True).start()
"""


@pytest.mark.promise("P7")
@pytest.mark.parametrize("busy", [5, -1, -2], ids=["idle", "in a loop", "holding the lock"])
def test_workers_end_with_a_host_that_is_killed(folder: Path, busy: int) -> None:
    """After a SIGKILL of the host no worker lives on, whatever it was doing; nor when a fork of the host does."""
    text = (
        ENDLESS.replace("XX", str(busy))
        + "import os, time\nif os.fork():\n    print('up', flush=True)\ntime.sleep(60)\n"
    )
    path = program(folder, text)
    memory = Path("/dev/shm")  # noqa: S108  # to see that nothing is put there
    before = sorted(each.name for each in memory.iterdir()) if memory.exists() else []
    with subprocess.Popen(
        [sys.executable, str(path)], env=environment(folder), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "up\n"
        assert len(workers(folder)) == 2
        host.kill()
        host.wait()
        eventually(lambda: workers(folder) == [], "workers outlived their host")
        os.killpg(host.pid, signal.SIGKILL)  # the fork
    assert (sorted(each.name for each in memory.iterdir()) if memory.exists() else []) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_the_whole_group_lets_the_host_finish(folder: Path, number: signal.Signals) -> None:
    """What a terminal sends to all processes leaves the workers to the host, which answers what it has in hand."""
    text = """
import signal, sys, threading
stop = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
with ms.ModelServer(registry, **settings) as server:
    def ask():
        print("up", flush=True)
        print(server.predict("m", {"x": [1.0]}, timeout_ms=20_000).prediction, flush=True)
    thread = threading.Thread(target=ask)
    thread.start()
    stop.wait()
    thread.join()
print("closed", flush=True)
"""
    path = program(folder, text)
    with subprocess.Popen(
        [sys.executable, str(path)], env=environment(folder), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "up\n"
        os.killpg(host.pid, number)
        assert host.stdout.read().split() == ["2.0", "closed"]
        assert host.wait() == 0
    assert workers(folder) == []
