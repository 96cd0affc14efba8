"""A real MLflow tracking store in a folder, filled as training jobs fill it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Its tracking URI, and the folder that models are logged to."""

    uri: str
    folder: Path

    def log(self, flavor: str, model: Any, name: str, metrics: dict[str, float] | None = None, **options: Any) -> str:
        """Log a model in a run of its own and register it; return the id of the run."""
        import mlflow  # noqa: PLC0415  # seconds, for those tests alone that need it

        with _settled(self), mlflow.start_run() as run:
            mlflow.log_metrics(metrics or {})
            logger = __import__(f"mlflow.{flavor}", fromlist=["log_model"]).log_model
            logger(model, name="model", registered_model_name=name, pip_requirements=[], **options)
            return str(run.info.run_id)

    def alias(self, name: str, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(name, alias, version)

    @property
    def client(self) -> Any:
        import mlflow  # noqa: PLC0415  # as above

        return mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def pyfunc(self, uri: str) -> Any:
        """Load a model as MLflow serves it."""
        import mlflow  # noqa: PLC0415  # as above

        with _settled(self):
            return mlflow.pyfunc.load_model(uri)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Store]:
    """Run a real tracking server, through which files are written and read as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    environment = os.environ | QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        running = subprocess.Popen([*command, *places], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", running)
        yield Store(f"http://127.0.0.1:{port}", folder)
    finally:
        running.terminate()
        running.wait(20)


def _wait_until_healthy(url: str, running: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            assert running.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not answer"
            threading.Event().wait(0.1)
        else:
            return


@contextlib.contextmanager
def _settled(store: Store) -> Iterator[None]:
    """Make a store MLflow's own for a moment, and let MLflow warn of what it likes."""
    import mlflow  # noqa: PLC0415  # as above

    before = os.getcwd()  # noqa: PTH109  # it is only handed back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(store.uri)
        mlflow.set_registry_uri(store.uri)
        os.chdir(store.folder)  # a default experiment logs below it
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # what forgets it
            mlflow.set_registry_uri(None)  # type: ignore[arg-type]  # as above
