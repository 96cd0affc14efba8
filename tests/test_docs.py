"""README and tutorial, run as they stand: their Python, their servers, their curl lines and the answers they show."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser

import modelserve
from modelserve import errors
from modelserve.config import ModelOptions, Settings
from modelserve.http import problems
from modelserve.types import Scaling

ROOT = Path(__file__).parents[1]
LIMIT_S = 30
PASSING = {"latency_ms", "request_id"}  # what differs from run to run in an answer


class Reader:
    """Works through a page like a patient reader in an empty folder: one block after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports: dict[str, int] = {}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.request: httpx.Request | None = None

    def read(self, page: Path) -> dict[str, int]:
        """Run a page's blocks in order; return how many there were of each language."""
        steps = {"python": self._run_python, "sh": self._run_command, "json": self._expect_answer}
        document = Sybil([CodeBlockParser(language, step) for language, step in steps.items()]).parse(page)
        counts = dict.fromkeys(steps, 0)
        for example in document.examples():
            example.evaluate()
            counts[example.region.lexemes["arguments"]] += 1
        return counts

    def leave(self) -> None:
        """Stop the servers that were started."""
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            assert server.wait(LIMIT_S) in {0, -15}

    def _run_python(self, example: Example) -> None:
        caption = example.region.lexemes.get("options", {}).get("caption")
        if caption is None:
            PythonEvaluator()(example)
            return
        path = self.folder / caption
        path.write_text(example.parsed, encoding="utf-8")
        if caption == "train.py":  # the others are for a server to import
            runpy.run_path(str(path))

    def _run_command(self, example: Example) -> None:
        program, *arguments = shlex.split(example.parsed)
        if program == "curl":
            self._prepare_request(*arguments)
        elif program == "modelserve":
            subprocess.run([sys.executable, "-m", "modelserve.cli", *arguments], env=self._environment(), check=True)
        else:
            self._start_server(program, arguments)

    def _environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)])}

    def _start_server(self, program: str, arguments: list[str]) -> None:
        port = next(each for each in re.findall(r"\d{4}", " ".join(arguments)))
        self.ports[port] = _free_port()
        command = [argument.replace(port, str(self.ports[port])) for argument in arguments]
        server = subprocess.Popen([sys.executable, "-m", program, *command], env=self._environment())
        self.servers.append(server)
        _wait_for_port(self.ports[port], server)

    def _prepare_request(self, url: str, option: str = "", body: str = "") -> None:
        for shown, port in self.ports.items():
            url = url.replace(f":{shown}/", f":{port}/")
        assert option in {"", "--json"}
        method, headers = ("POST", {"Content-Type": "application/json"}) if option else ("GET", {})
        self.request = httpx.Request(method, url, content=body, headers=headers)

    def _expect_answer(self, example: Example) -> None:
        """Send the request until the answer is the one shown: a promoted version takes a moment to arrive."""
        assert self.request is not None
        shown = json.loads(example.parsed)
        until = time.monotonic() + LIMIT_S
        answer = _send(self.request)
        while _lasting(answer) != _lasting(shown) and time.monotonic() < until:
            answer = _send(self.request)
        assert _lasting(answer) == _lasting(shown)
        assert answer.keys() == shown.keys()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reader = Reader(tmp_path)
    yield reader
    reader.leave()


def test_the_example_of_the_readme_runs(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    """The ten lines of the README register, promote and answer."""
    assert reader.read(ROOT / "README.md")["python"] == 1
    assert "Prediction(prediction=0, model_version='1.0.0'" in capsys.readouterr().out


def test_the_tutorial_runs(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of the tutorial runs, its servers start, and they give the answers it shows."""
    page = ROOT / "docs" / "tutorial.md"

    counts = reader.read(page)

    assert counts["json"] > 5
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == _shown_output(page)


@pytest.mark.timeout(120)  # imports the framework, in a worker process too
@pytest.mark.parametrize("name", ["onnx", "pytorch", "signatures", "tensorflow"])
def test_the_how_to_runs(reader: Reader, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the how-to runs, one after the other."""
    monkeypatch.syspath_prepend(reader.folder)  # where files of the page are written
    assert reader.read(ROOT / "docs" / "how-to" / f"{name}.md")["python"] >= 2


@pytest.mark.timeout(120)  # runs a suite of its own
def test_the_adapter_of_the_how_to_passes_the_contract(reader: Reader) -> None:
    """Installed as a package with the entry point shown, the adapter passes the tests shown."""
    page = ROOT / "docs" / "how-to" / "adapters.md"
    text = page.read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    ((group, points),) = tomllib.loads(shown)["project"]["entry-points"].items()
    package = reader.folder / "factors-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: factors\nVersion: 1\n", encoding="utf-8")
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (package / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")

    assert reader.read(page)["python"] == 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_factors.py"]
    suite = subprocess.run(command, env=reader._environment(), capture_output=True, text=True, check=False)

    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert int(re.findall(r"(\d+) passed", suite.stdout)[0]) > 10


def test_the_configuration_file_shown_is_read() -> None:
    """The file in the how-to is one that Settings takes, and says what the page says it says."""
    page = (ROOT / "docs" / "how-to" / "configure.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    Path("modelserve.toml").write_text(shown, encoding="utf-8")

    settings = Settings.load("modelserve.toml")

    assert settings.models is not None
    scaling = Scaling(in_after_s=600)
    expected = ModelOptions(executor="process", replicas=(1, 4), timeout_ms=200, scaling=scaling)
    assert settings.models["churn"] == expected


def test_every_option_of_a_model_is_documented() -> None:
    """The how-to has a row for each model option and each setting, with its true default."""
    page = (ROOT / "docs" / "how-to" / "configure.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([^|]*)` \|", page, re.MULTILINE)

    for model in (ModelOptions, Settings):
        for name, field in model.model_fields.items():
            rows.remove((name, repr(field.default).replace("'", '"')))
    assert not rows


def test_every_promise_names_tests_that_exist() -> None:
    """No promise stands on a test that was renamed or removed."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)

    assert len(named) > 20
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_every_error_is_documented() -> None:
    """The table of errors has each class of the tree, says whether it is retryable, and marks the public ones."""
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (.*(?:`\w+`).*) \|$", page, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    tree: list[type[errors.ModelServeError]] = [each for each in vars(errors).values() if isinstance(each, type)]

    assert len(rows) == len(tree)
    for (name, parents, _, retryable, _), error in zip(rows, tree, strict=True):
        public = error.__name__ in modelserve.__all__
        assert name == (f"**`{error.__name__}`**" if public else f"`{error.__name__}`")
        assert parents == ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        assert retryable == ("yes" if error.retryable else "no")


def test_every_problem_is_documented() -> None:
    """The table of problems has each status and type that the faces can answer, and no other."""
    page = (ROOT / "docs" / "reference" / "http.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| (\d{3}) \| `([a-z-]+)` \|", page, re.MULTILINE))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "modelserve" / "http").rglob("*.py"))

    raised = re.findall(r"HttpProblem\(\s*(\d{3}), \"([a-z-]+)\"", sources)
    translated = [(str(status), kind) for status, kind, _ in [*problems._KINDS.values(), problems._UNEXPECTED]]
    assert documented == {*raised, *translated}


def test_every_room_is_in_the_picture() -> None:
    """The picture of the rooms names each module of the library in its room, and nothing that is not there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("```text\n")[2].partition("```")[0]
    rooms = re.split(r"^ ?(\w+(?:/|\.py)) ", picture, flags=re.MULTILINE)[1:]
    drawn = dict(zip(rooms[::2], rooms[1::2], strict=True))
    library = ROOT / "modelserve"

    folders = {f"{path.parent.name}/": path.parent for path in library.glob("*/__init__.py")}
    assert drawn.keys() == folders.keys() | {path.name for path in library.glob("[!_]*.py")}
    for name, folder in folders.items():
        for module in [*folder.glob("[!_]*.py"), *folder.glob("*/[!_]*.py")]:
            assert re.search(rf"\b({module.stem}|{module.parent.name})\b", drawn[name]), module


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _shown_output(page: Path) -> list[str]:
    """Return the lines of output that a page shows as comments at the end of its blocks."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("# ")]


def _send(request: httpx.Request) -> dict[str, Any]:
    with httpx.Client(timeout=LIMIT_S) as client:
        answer: dict[str, Any] = client.send(request).json()
    return answer


def _lasting(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in PASSING}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not listen"
            threading.Event().wait(0.05)
        else:
            return
