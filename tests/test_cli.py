"""The command line over SQLite: inside this process by typer's runner, and as a program of its own."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import pty
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import numpy as np
import pandas as pd
import pytest
import redis as redis_py
import skops.io
import typer
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner, Result

import modelserve
from modelserve import plugins
from modelserve.cli.commands import app
from modelserve.cli.reading import bytes_of, duration_of, rows_of
from modelserve.ports import CacheItem
from modelserve.signature import columns_of, marks_in
from modelserve.tabular import read_table

ROOT = Path(modelserve.__file__).parents[1]
ROWS = pd.DataFrame({"tenure": [1, 5, 40, 60], "spend": [0.5, 1.5, 2.5, 3.5]})
YOUNG = '{"tenure": 3, "spend": 0.1}'

Invoke: TypeAlias = Callable[..., Result]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files as a training job leaves them: models that disagree on who is young, and example rows."""
    folder = tmp_path_factory.mktemp("saved")
    young = LogisticRegression().fit(ROWS, [1, 1, 0, 0])
    old = LogisticRegression().fit(ROWS, [0, 0, 1, 1])
    skops.io.dump(young, folder / "young.skops")
    skops.io.dump(old, folder / "old.skops")
    joblib.dump(young, folder / "young.joblib")
    ROWS.to_csv(folder / "rows.csv", index=False)
    (folder / "rows.json").write_text(ROWS.to_json(orient="records"), encoding="utf-8")
    return folder


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that holds the registry and the cache."""
    for name in os.environ:
        if name.startswith("MODELSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def invoke(settled: Path) -> Invoke:
    """Run one command in this process; an error that is not told as one fails the test."""

    def invoke(*arguments: str | Path, given: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(each) for each in arguments], input=given, catch_exceptions=False)

    return invoke


@pytest.fixture
def churn(invoke: Invoke, saved: Path) -> Invoke:
    """The same, in a registry where version 1 of ``churn`` is in production and version 2 in staging."""
    for version, file in (("1", "young.skops"), ("2", "old.skops")):
        assert invoke("register", "churn", version, saved / file, "--example", saved / "rows.csv").exit_code == 0
    assert invoke("promote", "churn", "1").exit_code == 0
    return invoke


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m modelserve.cli`` with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "modelserve.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=50, check=False, **({"input": ""} | options)
    )


def answer_of(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def table_of(result: Result) -> list[list[str]]:
    """Return the cells of a printed table, which two spaces separate."""
    assert result.exit_code == 0, result.output
    return [[cell for cell in line.split("  ") if cell] for line in result.stdout.splitlines()]


def stripped(table: list[list[str]]) -> list[list[str]]:
    return [[cell.strip() for cell in line] for line in table]


# -- the whole story ---------------------------------------------------------------------------------------


def test_a_model_goes_from_a_file_to_production_and_back(invoke: Invoke, saved: Path) -> None:
    """Registered files are promoted, answer, and are rolled back, and the history tells all of it."""

    def production_answers() -> tuple[str, int]:
        answer = answer_of(invoke("predict", "churn", "--inputs", YOUNG))
        return answer["model_version"], answer["prediction"]

    registered = invoke("register", "churn", "1", saved / "young.skops", "--example", saved / "rows.csv")
    assert registered.stdout == "churn 1 is registered, in staging\ninputs: tenure int64, spend float64\n"
    invoke("register", "churn", "2", saved / "old.skops", "--example", saved / "rows.csv")
    assert [line[:2] for line in stripped(table_of(invoke("versions", "churn")))] == [
        ["version", "status"],
        ["2", "staging"],
        ["1", "staging"],
    ]

    assert invoke("promote", "churn", "1", "--reason", "first").stdout == "churn 1 is in production\n"
    assert production_answers() == ("1", 1)
    assert invoke("promote", "churn", "2").stdout == "churn 2 is in production\n"
    assert production_answers() == ("2", 0)
    assert invoke("rollback", "churn", "--reason", "all wrong").stdout == "churn 1 is back in production\n"
    assert production_answers() == ("1", 1)

    history = stripped(table_of(invoke("history", "churn")))
    assert history[0] == ["generation", "when", "who", "what", "version", "production after", "why"]
    assert [[line[0], *line[3:]] for line in history[1:]] == [
        ["1", "register", "1", "-", "-"],
        ["2", "register", "2", "-", "-"],
        ["3", "promote", "1", "1", "first"],
        ["4", "promote", "2", "2", "-"],
        ["5", "rollback", "1", "1", "all wrong"],
    ]


def test_the_story_told_by_a_program_of_its_own(settled: Path, saved: Path) -> None:
    """``python -m modelserve.cli`` registers, promotes, and answers what is piped into it."""
    registered = program("register", "churn", "1", saved / "young.skops", "--example", saved / "rows.csv")
    assert (registered.returncode, registered.stderr) == (0, "")
    assert program("promote", "churn", "1").stdout == "churn 1 is in production\n"
    answered = program("predict", "churn", input=YOUNG)
    assert (answered.returncode, answered.stderr) == (0, "")
    assert json.loads(answered.stdout)["prediction"] == 1


def test_archive_takes_a_version_out_of_staging(churn: Invoke) -> None:
    """An archived version keeps its row; the one in production cannot be archived."""
    assert churn("archive", "churn", "2", "--reason", "worse").stdout == "churn 2 is archived\n"
    assert [each["status"] for each in answer_of(churn("versions", "churn", "--json"))] == ["archived", "production"]
    refused = churn("archive", "churn", "1")
    assert refused.exit_code == 1
    assert "promote another version or roll back first" in refused.stderr


# -- signatures --------------------------------------------------------------------------------------------


def test_a_version_is_signed_where_it_is_registered_or_later(invoke: Invoke, saved: Path, settled: Path) -> None:
    """A server with the public key answers with what the private key signed, and with nothing else."""
    made = invoke("keygen", "keys")
    assert made.exit_code == 0
    assert "private.pem" in made.stdout
    example = ("--example", saved / "rows.csv")
    invoke("register", "churn", "1", saved / "young.skops", *example, "--key", "keys/private.pem")
    invoke("register", "churn", "2", saved / "young.skops", *example)
    (settled / "modelserve.toml").write_text('trusted_keys = ["keys/public.pem"]\n', encoding="utf-8")

    def predict(version: str) -> Result:
        wanted = ("churn", "--version", version, "--inputs", YOUNG)
        invoke("promote", "churn", version)
        return invoke("--config", "modelserve.toml", "predict", *wanted)

    assert answer_of(predict("1"))["model_version"] == "1"
    refused = predict("2")
    assert refused.exit_code == 1
    assert "churn 2 is not signed" in refused.stderr
    signed = invoke("sign", "churn", "2", "--key", "keys/private.pem", "--reason", "reviewed")
    assert signed.stdout.startswith("churn 2 is signed: sklearn, skops, blobs/sha256/")
    assert "inputs: tenure int64, spend float64" in signed.stdout
    assert answer_of(predict("2"))["model_version"] == "2"
    assert "reviewed" in invoke("history", "churn").stdout


def test_keys_are_never_overwritten(invoke: Invoke) -> None:
    """A second pair needs another folder, and a wrong key is told in one line."""
    assert invoke("keygen", "keys").exit_code == 0
    refused = invoke("keygen", "keys")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "never overwritten" in refused.stderr
    wrong = invoke("sign", "churn", "1", "--key", "keys/public.pem")
    assert wrong.stderr.count("\n") == 1


# -- register ----------------------------------------------------------------------------------------------


def test_register_passes_every_option_on(invoke: Invoke, saved: Path) -> None:
    """Metrics as pairs and as JSON are merged, a metric that is no JSON is text, tags are text, the rest arrives."""
    pickle, rows = saved / "young.joblib", saved / "rows.csv"
    options = ["--framework", "sklearn", "--format", "joblib", "--method", "predict_proba", "--reason", "nightly"]
    metrics = ["--metrics", "auc=0.93", "--metrics", '{"rows": 4, "by": {"plan": 0.9}}', "--metrics", "kind=log=reg"]
    tags = ["--tag", "team=growth", "--tag", "job=17"]
    assert invoke("register", "churn", "1", pickle, "--example", rows, *options, *metrics, *tags).exit_code == 0
    (version,) = answer_of(invoke("versions", "churn", "--json"))
    assert version["metrics"] == {"auc": 0.93, "rows": 4, "by": {"plan": 0.9}, "kind": "log=reg"}
    assert version["tags"] == {"team": "growth", "job": "17"}
    assert version["load_options"] == {"method": "predict_proba"}
    assert (version["framework"], version["artifact"]["format"]) == ("sklearn", "joblib")
    assert answer_of(invoke("history", "churn", "--json"))[0]["reason"] == "nightly"


def test_trusted_types_are_named_one_by_one(invoke: Invoke, saved: Path, tmp_path: Path) -> None:
    """A type outside the safe list is refused by name, and taken when it is trusted."""
    path = tmp_path / "counter.skops"
    model = LogisticRegression().fit(ROWS, [1, 1, 0, 0])
    model.notes_ = CliRunner()
    skops.io.dump(model, path)
    register = ("register", "churn", "1", path, "--example", saved / "rows.csv")
    refused = invoke(*register)
    assert refused.exit_code == 1
    assert "typer.testing.CliRunner" in refused.stderr
    assert invoke(*register, "--trusted", "typer.testing.CliRunner").exit_code == 0


@pytest.mark.parametrize("suffix", ["csv", "json", "npy", "parquet"])
def test_an_example_is_read_from_every_kind_of_file(invoke: Invoke, saved: Path, tmp_path: Path, suffix: str) -> None:
    """A table gives one input per column, a bare array one input ``x``."""
    example = tmp_path / f"example.{suffix}"
    model = saved / "young.skops"
    inputs = "tenure int64, spend float64"
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
        ROWS.to_parquet(example)
    elif suffix == "npy":
        model, inputs = tmp_path / "unnamed.skops", "x float64[2]"
        skops.io.dump(LogisticRegression().fit(ROWS.to_numpy(), [1, 1, 0, 0]), model)
        np.save(example, ROWS.to_numpy())
    else:
        example = saved / f"rows.{suffix}"
    assert f"inputs: {inputs}\n" in invoke("register", "churn", "1", model, "--example", example).stdout


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.txt", b"1 2", "its name must end in one of .csv, .json, .npy, .parquet"),
        ("rows.json", b"{", "not JSON"),
        ("rows.json", b"[[1], [1, 2]]", "example: "),
        ("rows.npy", b"", "cannot be read"),
        ("rows.npy", b"tenure,spend", "cannot be read"),
        ("rows.csv", b"", "cannot be read"),
        ("rows.csv", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_an_example_that_cannot_be_read_is_named(
    invoke: Invoke, saved: Path, tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    """A file of an unknown kind, or of other content than its name says, is one line, and nothing is registered."""
    (tmp_path / name).write_bytes(content)
    refused = invoke("register", "churn", "1", saved / "young.skops", "--example", tmp_path / name)
    assert refused.exit_code == 1
    assert problem in refused.stderr
    assert answer_of(invoke("models", "--json")) == []


def test_an_array_of_objects_is_not_unpickled(invoke: Invoke, saved: Path, tmp_path: Path) -> None:
    """An example in a .npy file that holds a pickle is refused unopened."""
    np.save(tmp_path / "rows.npy", np.array([{"tenure": 1}], dtype=object), allow_pickle=True)
    refused = invoke("register", "churn", "1", saved / "young.skops", "--example", tmp_path / "rows.npy")
    assert refused.exit_code == 1
    assert "cannot be read: Object arrays cannot be loaded" in refused.stderr


def test_parquet_without_its_reader_says_what_to_install(
    invoke: Invoke, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pandas has no reader for Parquet, the answer is the line that installs one."""
    for module in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    refused = invoke("register", "churn", "1", saved / "young.skops", "--example", tmp_path / "rows.parquet")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "pip install pyarrow" in refused.stderr


# -- listings ----------------------------------------------------------------------------------------------


def test_models_lists_what_is_in_production(churn: Invoke, saved: Path) -> None:
    """Each model is a line, also one of which nothing was promoted yet."""
    churn("register", "fraud", "7", saved / "young.skops", "--example", saved / "rows.csv")
    churn("promote", "churn", "2")
    assert stripped(table_of(churn("models"))) == [
        ["name", "production", "previous", "generation"],
        ["churn", "2", "1", "4"],
        ["fraud", "-", "-", "1"],
    ]


def test_listings_are_json_when_asked(churn: Invoke) -> None:
    """``--json`` prints one document with everything the registry knows."""
    assert answer_of(churn("models", "--json")) == [
        {"name": "churn", "production": "1", "previous": None, "generation": 3}
    ]
    newest, first = answer_of(churn("versions", "churn", "--json"))
    assert (newest["version"], newest["status"]) == ("2", "staging")
    assert (first["version"], first["status"]) == ("1", "production")
    assert len(first["artifact"]["sha256"]) == 64
    *_, promoted = answer_of(churn("history", "churn", "--json"))
    assert (promoted["action"], promoted["production"], promoted["generation"]) == ("promote", "1", 3)


def test_a_piped_line_is_whole_and_bare(churn: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a reason is, its event stays one line without colours or trailing spaces."""
    monkeypatch.setenv("COLUMNS", "40")
    reason = " ".join(["because"] * 60)
    churn("promote", "churn", "2", "--reason", reason)
    lines = churn("history", "churn").stdout.splitlines()
    assert len(lines) == 5
    assert lines[-1].endswith(f"  {reason}")
    assert all(line == line.rstrip() and "\x1b" not in line for line in lines)


def test_a_reason_commands_no_terminal(churn: Invoke) -> None:
    """Line breaks, escape sequences and markup in what others wrote are shown, not obeyed."""
    churn("promote", "churn", "2", "--reason", "two\nlines \x1b[31m[bold]loud")
    assert churn("history", "churn").stdout.splitlines()[-1].endswith(r"two\nlines \x1b[31m[bold]loud")


def test_an_empty_registry_lists_nothing(invoke: Invoke) -> None:
    """No model is no line, and an empty list in JSON."""
    assert invoke("models").stdout == ""
    assert answer_of(invoke("models", "--json")) == []


# -- predict -----------------------------------------------------------------------------------------------


def test_one_row_gets_the_document_of_the_http_face(churn: Invoke) -> None:
    """An object is one row, from the option or from standard input."""
    answer = answer_of(churn("predict", "churn", "--inputs", YOUNG))
    assert answer.keys() == {"prediction", "model_version", "latency_ms", "request_id", "cached"}
    assert answer_of(churn("predict", "churn", given=YOUNG))["prediction"] == answer["prediction"] == 1


@pytest.mark.parametrize("file", ["rows.csv", "rows.json"])
def test_a_file_of_rows_is_answered_in_order(churn: Invoke, saved: Path, file: str) -> None:
    """A table, or a list of objects, gets a list of predictions by one version."""
    answer = answer_of(churn("predict", "churn", "--file", saved / file))
    assert (answer["predictions"], answer["model_version"]) == ([1, 1, 0, 0], "1")
    assert "prediction" not in answer


def test_any_version_can_be_asked(churn: Invoke) -> None:
    """``--version`` loads a version that is not in production, and changes nothing in the registry."""
    answer = answer_of(churn("predict", "churn", "--version", "2", "--inputs", YOUNG))
    assert (answer["prediction"], answer["model_version"]) == (0, "2")
    assert answer_of(churn("models", "--json"))[0]["generation"] == 3


def test_a_pickle_is_refused_until_it_is_allowed(
    churn: Invoke, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle can be registered; it is loaded only where the options say so, and the refusal names them."""
    churn("register", "churn", "3", saved / "young.joblib", "--example", saved / "rows.csv")
    ask = ("predict", "churn", "--version", "3", "--inputs", YOUNG)
    refused = program(*ask)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "pickle" in refused.stderr
    assert "allow_pickle=True" in refused.stderr

    config = tmp_path / "modelserve.toml"
    config.write_text("[models.churn]\nallow_pickle = true\n", encoding="utf-8")
    assert answer_of(churn("--config", config, *ask))["prediction"] == 1
    monkeypatch.setenv("MODELSERVE_MODELS__CHURN__ALLOW_PICKLE", "true")
    assert answer_of(churn(*ask))["prediction"] == 1


@pytest.mark.parametrize(
    ("arguments", "given", "problem"),
    [
        (["nope", "--inputs", YOUNG], None, "no model named 'nope'"),
        (["churn", "--version", "9", "--inputs", YOUNG], None, "model 'churn' has no version '9'"),
        (["churn", "--inputs", '{"tenure": "x", "spend": 1}'], None, "tenure: expected int64, got a string"),
        (["churn"], '[{"tenure": 1, "spend": 1}, {"tenure": 1}]', "instances[1].spend: missing"),
        (["churn"], "[]", "there is no row to answer"),
        (["churn"], "7", "must be an object"),
        (["churn"], "", "standard input: not JSON"),
    ],
)
def test_what_cannot_be_answered_is_told(churn: Invoke, arguments: list[str], given: str | None, problem: str) -> None:
    """A request at fault gets the library's sentence, no answer, and exit code 1."""
    refused = churn("predict", *arguments, given=given)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert problem in refused.stderr


def test_a_model_without_production_has_no_answer(invoke: Invoke, saved: Path) -> None:
    """Until a version is promoted, one has to be named."""
    invoke("register", "churn", "1", saved / "young.skops", "--example", saved / "rows.csv")
    refused = invoke("predict", "churn", "--inputs", YOUNG)
    assert refused.stderr == "error: model 'churn' has no production version\n"
    assert answer_of(invoke("predict", "churn", "--version", "1", "--inputs", YOUNG))["prediction"] == 1


def test_nobody_is_left_waiting_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without inputs, and with nothing piped, it is wrong usage rather than a silent wait."""
    controller, terminal = pty.openpty()
    with os.fdopen(controller), os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(typer.BadParameter, match="JSON on standard input"):
            rows_of(None, None)


# -- errors and exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["versions", "nope"], "no model named 'nope'"),
        (["history", "nope"], "no model named 'nope'"),
        (["promote", "churn", "9"], "model 'churn' has no version '9'"),
        (["rollback", "churn"], "no earlier version to go back to"),
        (["--registry", "mysql://host/db", "models"], "not in mysql://"),
        (["--registry", "sqlite:////nowhere/at/all.db", "models"], "unavailable"),
        (["--config", "nowhere.toml", "models"], "no configuration file at nowhere.toml"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(churn: Invoke, command: list[str], problem: str) -> None:
    """Standard output stays empty, standard error holds the sentence and no traceback."""
    refused = churn(*command)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert problem in refused.stderr


def test_a_version_is_registered_once(churn: Invoke, saved: Path) -> None:
    """Registering a version again is refused with the reason, whole though it is long."""
    refused = churn("register", "churn", "1", saved / "old.skops", "--example", saved / "rows.csv")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("versions are immutable, register the new artifact under a new one\n")


@pytest.mark.parametrize(
    "command",
    [
        ["nonsense"],
        ["promote", "churn"],
        ["register", "churn", "3", "nowhere.skops"],
        ["register", "churn", "3", ".", "--metrics", "0.93"],
        ["register", "churn", "3", ".", "--metrics", "{auc"],
        ["register", "churn", "3", ".", "--tag", "=growth"],
        ["predict", "churn", "--inputs", "{"],
        ["predict", "churn", "--inputs", "{}", "--file", "rows.json"],
        ["predict", "churn", "--file", "nowhere.json"],
    ],
)
def test_wrong_usage_is_exit_code_2(churn: Invoke, settled: Path, command: list[str]) -> None:
    """What can be seen to be wrong in the command itself is answered with how to get help."""
    (settled / "rows.json").write_text("{}", encoding="utf-8")
    refused = churn(*command)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--help' for help" in refused.stderr


def test_an_error_is_red_on_a_terminal_alone(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colour is for terminals, and for none that asks for no colour."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert invoke("versions", "nope").stderr == "error: no model named 'nope'\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert invoke("versions", "nope").stderr == "\x1b[31merror: no model named 'nope'\x1b[0m\n"


@pytest.mark.parametrize("driver", ["typer", "rich"])
def test_a_missing_driver_answers_with_the_install_line(driver: str) -> None:
    """Where the extra is not installed, the program says how to install it."""
    code = f"import sys; sys.modules[{driver!r}] = None; from modelserve.cli import run; run()"
    refused = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"error: {driver} is not installed; run: pip install 'modelserve[cli]'\n"


# -- the database and the global options -------------------------------------------------------------------


def test_the_database_is_brought_to_this_release(invoke: Invoke, settled: Path) -> None:
    """``db upgrade`` creates the tables, may be repeated, and refuses the tables of a later release."""
    assert invoke("db", "upgrade").exit_code == 0
    assert invoke("db", "upgrade").exit_code == 0
    with sqlite3.connect(settled / "models.db") as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        connection.execute("UPDATE modelserve_alembic_version SET version_num = '9999', compatible_with = '9999'")
    connection.close()
    assert {"model_version", "deployment", "deployment_event"} <= tables
    refused = invoke("db", "upgrade")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "this process is older than the database: upgrade modelserve" in refused.stderr


def test_an_option_goes_before_the_environment_before_the_file(
    invoke: Invoke, saved: Path, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any of them the registry is ``models.db`` in the working directory."""
    places = {"default": "models.db", "file": "file.db", "environment": "environment.db", "option": "option.db"}
    for name, file in places.items():
        register = ("register", name, "1", saved / "young.skops", "--example", saved / "rows.csv")
        assert invoke("--registry", f"sqlite:///{file}", "--artifacts", "kept", *register).exit_code == 0

    def found(*options: str) -> list[str]:
        return [model["name"] for model in answer_of(invoke(*options, "models", "--json"))]

    (settled / "modelserve.toml").write_text('registry = "sqlite:///file.db"\n', encoding="utf-8")
    assert found() == ["default"]
    assert found("--config", "modelserve.toml") == ["file"]
    monkeypatch.setenv("MODELSERVE_REGISTRY", "sqlite:///environment.db")
    assert found("--config", "modelserve.toml") == ["environment"]
    assert found("--config", "modelserve.toml", "--registry", "sqlite:///option.db") == ["option"]


def test_artifacts_go_where_they_are_told(
    invoke: Invoke, saved: Path, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models' bytes lie under ``--artifacts``, else under what the environment names."""
    monkeypatch.setenv("MODELSERVE_ARTIFACTS", str(settled / "from-environment"))
    invoke("register", "churn", "1", saved / "young.skops", "--example", saved / "rows.csv")
    option = ("--artifacts", settled / "from-option")
    invoke(*option, "register", "churn", "2", saved / "old.skops", "--example", saved / "rows.csv")
    for place, file in (("from-environment", "young.skops"), ("from-option", "old.skops")):
        stored = {path.read_bytes() for path in (settled / place).rglob("*") if path.is_file()}
        assert (saved / file).read_bytes() in stored


def test_version_is_the_version_of_the_library(invoke: Invoke) -> None:
    """``--version`` needs no registry and no command."""
    assert invoke("--version").stdout == f"{modelserve.__version__}\n"


def test_help_needs_no_settings_that_are_right(invoke: Invoke, settled: Path) -> None:
    """A broken configuration keeps nobody from reading how a command is used, and no database is made."""
    shown = invoke("--config", "nowhere.toml", "register", "--help")
    assert shown.exit_code == 0
    assert "--example" in shown.stdout
    assert list(settled.iterdir()) == []


def test_the_installed_command_is_this_one() -> None:
    """The entry point that the package declares exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert plugins.resolve(project["scripts"]["modelserve"]).__name__ == "run"


# -- the predictions that servers share --------------------------------------------------------------------


def test_the_predictions_of_a_model_are_forgotten(invoke: Invoke, redis_url: str) -> None:
    """Of a shared cache, what is kept of one model goes, and is counted; that of another one stays."""

    async def put() -> None:
        cache = plugins.cache(redis_url)
        await cache.put_many([CacheItem(key, b"1", 60.0) for key in ("churn:a", "churn:b", "churn-eu:a")])
        await cache.close()

    asyncio.run(put())
    for count in (2, 0):
        told = invoke("predictions", "clear", "churn", "--cache", redis_url)
        assert told.exit_code == 0
        assert told.stdout == f"{count} predictions of churn are forgotten\n"
    assert "1 predictions" in invoke("predictions", "clear", "churn-eu", "--cache", redis_url).stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("churn",), "no cache is set"),
        (("churn", "--cache", "memory://"), "memory:// is in the processes of the servers"),
        (("churn", "--cache", "redis://127.0.0.1:1"), "Redis is unavailable: no connection"),
        (("no*name", "--cache", "redis://127.0.0.1:1"), "is no model's name"),
    ],
)
def test_predictions_that_cannot_be_forgotten_are_told(
    invoke: Invoke, arguments: tuple[str, ...], problem: str
) -> None:
    """Without a cache that can be reached from here there is one line that says why, and exit code 1."""
    told = invoke("predictions", "clear", *arguments)
    assert told.exit_code == 1
    assert problem in told.stderr
    assert len(told.stderr.splitlines()) == 1


# -- the disk cache ----------------------------------------------------------------------------------------


def test_the_cache_is_listed_with_the_versions_that_refer_to_it(churn: Invoke, settled: Path) -> None:
    """The model and its example are named by the version that has them; as JSON, too."""
    answer_of(churn("predict", "churn", "--inputs", YOUNG))
    lines = stripped(table_of(churn("cache", "ls")))
    assert lines[0] == ["key", "kind", "bytes", "last use", "in use", "versions"]
    assert {tuple(line[i] for i in (1, 4)) for line in lines[1:]} == {("file", "no")}
    assert any("churn 1" in line[5] for line in lines[1:])
    found = json.loads(churn("cache", "ls", "--json").stdout)
    assert {frozenset(each) for each in found} == {frozenset({"key", "kind", "size", "last_use", "in_use", "versions"})}
    assert any("churn 1" in each["versions"] for each in found)


def test_a_cache_is_listed_without_a_registry(invoke: Invoke, churn: Invoke, settled: Path) -> None:
    """What cannot be known is not claimed, and looking makes no database."""
    answer_of(churn("predict", "churn", "--inputs", YOUNG))
    (settled / "models.db").unlink()
    assert {each["versions"] for each in json.loads(invoke("cache", "ls", "--json").stdout)} == {None}
    assert stripped(table_of(invoke("cache", "ls")))[1][5] == "?"
    assert not (settled / "models.db").exists()


def test_the_cache_is_pruned(churn: Invoke, settled: Path) -> None:
    """A dry run and the real one print the same; what is younger, fits, or served last, stays unless all is to go."""
    answer_of(churn("predict", "churn", "--inputs", YOUNG))
    assert json.loads(churn("cache", "prune", "--older-than", "30d", "--json").stdout) == []
    assert json.loads(churn("cache", "prune", "--max-bytes", "1GiB", "--json").stdout) == []
    assert json.loads(churn("cache", "prune", "--json").stdout) == []
    planned = churn("cache", "prune", "--all", "--dry-run", "--json").stdout
    assert len(json.loads(planned)) > 0
    assert churn("cache", "prune", "--all", "--json").stdout == planned
    assert json.loads(churn("cache", "ls", "--json").stdout) == []


def test_damage_in_the_cache_is_told_by_the_exit_code(churn: Invoke, settled: Path) -> None:
    """All sound is 0; one flipped bit is 1, and once it is set aside 0 again."""
    answer_of(churn("predict", "churn", "--inputs", YOUNG))
    assert churn("cache", "verify").exit_code == 0
    victim = next((settled / "cache" / "blobs" / "sha256").iterdir())
    data = bytearray(victim.read_bytes())
    data[0] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    told = churn("cache", "verify", "--json")
    assert told.exit_code == 1
    bad = [each["key"] for each in json.loads(told.stdout) if not each["sound"]]
    assert bad == [f"blobs/sha256/{victim.name}"]
    assert churn("cache", "verify").exit_code == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", 1000), ("20GB", 20 * 10**9), ("512MiB", 2**29), ("0.5k", 500), ("1_000B", 1000), ("2 TB", 2 * 10**12)],
)
def test_sizes_have_units(text: str, expected: int) -> None:
    """Decimal units and binary ones."""
    assert bytes_of(text, "--max-bytes") == expected


@pytest.mark.parametrize(("text", "hours"), [("30d", 720), ("12h", 12), ("90m", 1.5), ("36 s", 0.01)])
def test_times_have_units(text: str, hours: float) -> None:
    """Days to seconds."""
    assert duration_of(text, "--older-than") == dt.timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "x", "-1", "1XB", "1e3", "iB", "30", "999999999d9"])
def test_what_is_no_size_or_time_is_wrong_usage(invoke: Invoke, text: str) -> None:
    """The message shows what is meant."""
    wrong = invoke("cache", "prune", "--older-than", text)
    assert wrong.exit_code == 2
    assert "30d" in wrong.stderr
    if text != "30":
        assert invoke("cache", "prune", "--max-bytes", text).exit_code == 2


# -- features ----------------------------------------------------------------------------------------------


def test_a_table_is_published_and_looked_into(
    invoke: Invoke, redis_url: str, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``features load``, ``put`` and ``get`` write and show rows of the store that a server reads."""
    monkeypatch.setenv("MODELSERVE_FEATURES", redis_url)
    table = pd.DataFrame({"user_id": [1, 2], "spend": [10.5, 20.0], "at": [1000.0, 2000.0]})
    table.to_csv(settled / "users.csv", index=False)
    table.to_parquet(settled / "users.parquet")
    for file in ("users.csv", "users.parquet"):
        loaded = invoke("features", "load", file, "--group", "user_id", "--time", "at")
        assert loaded.stdout == "2 rows of user_id are written\n"
        (row,) = json.loads(invoke("features", "get", "user_id", "2", "spend", "--json").stdout)
        assert row == {"feature": "spend", "status": "present", "value": 20.0, "written": "1970-01-01 00:33:20Z"}
    assert invoke("features", "put", "user_id", "3", "spend=1.5", "plan=pro", "--store", redis_url).exit_code == 0
    shown = invoke("features", "get", "user_id", "3", "plan", "spend", "other").stdout
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["plan", "present", "pro"],
        ["spend", "present", "1.5"],
        ["other", "missing", "-"],
    ]


def test_keys_in_a_csv_file_are_texts(
    invoke: Invoke, redis_url: str, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entity ``007`` of a file that knows no types is not the entity 7."""
    monkeypatch.setenv("MODELSERVE_FEATURES", redis_url)
    (settled / "agents.csv").write_text("agent,score\n007,1.5\n", encoding="utf-8")
    assert invoke("features", "load", settled / "agents.csv", "--group", "agent").exit_code == 0
    statuses = [invoke("features", "get", "agent", key, "score", "--json").stdout for key in ("007", "7")]
    assert [json.loads(each)[0]["status"] for each in statuses] == ["present", "missing"]


def test_texts_of_a_csv_file_are_themselves(
    invoke: Invoke, redis_url: str, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``NA`` is a key and a country where there are texts, and no number where there are numbers; nothing is null."""
    monkeypatch.setenv("MODELSERVE_FEATURES", redis_url)
    rows = "code,country,score\nNA,NA,1.5\nnull,,NA\nnan,DE,\n"
    (settled / "places.csv").write_text(rows, encoding="utf-8")
    assert invoke("features", "load", settled / "places.csv", "--group", "place", "--key", "code").exit_code == 0
    found = [
        [
            row["value"]
            for row in json.loads(invoke("features", "get", "place", key, "country", "score", "--json").stdout)
        ]
        for key in ("NA", "null", "nan")
    ]
    assert found == [["NA", 1.5], [None, None], ["DE", None]]


def test_a_gap_in_a_csv_example_is_what_pandas_makes_of_it(tmp_path: Path) -> None:
    """A model that was trained on such a file has seen NaN, and None is another thing to it."""
    (tmp_path / "rows.csv").write_text("plan,age\npro,1\n,2\nNA,3\n", encoding="utf-8")
    table = read_table(tmp_path / "rows.csv")
    assert table["plan"].isna().tolist() == [False, True, False]
    assert marks_in(columns_of(table)["plan"]) == {"NaN"}


def test_a_table_without_rows_publishes_nothing(
    invoke: Invoke, redis_url: str, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that has nothing to publish today has not failed."""
    monkeypatch.setenv("MODELSERVE_FEATURES", redis_url)
    (settled / "users.csv").write_text("user_id,spend\n", encoding="utf-8")
    assert invoke("features", "load", settled / "users.csv", "--group", "user_id").stdout.startswith("0 rows")


@pytest.mark.parametrize(
    ("value", "status", "stored"),
    [
        ("a=NaN", "null", None),
        ("a=[1.5, 2]", "present", [1.5, 2]),
        ("a=", "present", ""),
        ("a=NaNs", "present", "NaNs"),
    ],
)
def test_a_value_on_the_command_line_is_what_it_says(
    invoke: Invoke, redis_url: str, monkeypatch: pytest.MonkeyPatch, value: str, status: str, stored: Any
) -> None:
    """JSON is read as JSON, NaN is no number, and the rest is text; a list can be looked at, too."""
    monkeypatch.setenv("MODELSERVE_FEATURES", redis_url)
    assert invoke("features", "put", "item", "sku", value).exit_code == 0
    assert invoke("features", "get", "item", "sku", "a").exit_code == 0
    (row,) = json.loads(invoke("features", "get", "item", "sku", "a", "--json").stdout)
    assert (row["status"], row["value"]) == (status, stored)


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("a=1e400", 1, "a: inf cannot be stored"),
        ("a=99999999999999999999999", 1, "a: a whole number of more than 64 bits"),
        ("price", 2, "'price' is not KEY=VALUE"),
        ('{"a": 1', 2, "is not JSON"),
        ("[1]", 2, "is not KEY=VALUE"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused(
    invoke: Invoke, redis_url: str, monkeypatch: pytest.MonkeyPatch, value: str, code: int, said: str
) -> None:
    """Nothing is rounded or becomes text on the way; and no other command's option is blamed."""
    monkeypatch.setenv("MODELSERVE_FEATURES", redis_url)
    refused = invoke("features", "put", "item", "sku", value)
    assert refused.exit_code == code
    assert said in refused.stderr
    assert "--metrics" not in refused.stderr


def test_a_time_that_is_none_is_shown(invoke: Invoke, redis_server: Any, redis_url: str) -> None:
    """Milliseconds that somebody wrote for seconds are there to be seen."""
    prefix = redis_url.partition("prefix=")[2]
    with redis_py.Redis(port=redis_server.port) as client:
        for key, moment in (("1", "1700000000000"), ("2", "1e300"), ("3", "-1e12")):
            client.hset(f"{prefix}modelserve:features:item:{key}", mapping={"a": "1", "_ts": moment})
            shown = invoke("features", "get", "item", key, "a", "--store", redis_url)
            assert shown.exit_code == 0
            assert "s after 1970" in shown.stdout


def test_without_a_feature_store_the_command_says_how_to_name_one(invoke: Invoke) -> None:
    """Nothing is looked for anywhere else."""
    refused = invoke("features", "get", "user_id", "3", "plan")
    assert refused.exit_code == 1
    assert "give --store, or set MODELSERVE_FEATURES" in refused.stderr
