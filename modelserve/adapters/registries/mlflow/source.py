"""The tracking server: which version an alias means, its files, and the metrics of the run that it came from."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.registries.mlflow.examples import example_of
from modelserve.adapters.registries.mlflow.flavors import open_model
from modelserve.adapters.registries.mlflow.schema import signature_of
from modelserve.errors import BackendUnavailable, InvalidInput, ModelServeError
from modelserve.ports import SourceModel, SourceVersion
from modelserve.types import Json

_URI: Final = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/@]+))")
_NOT_THERE: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
_LOGGED_MODEL: Final = "models:/"
_DESCRIPTION: Final = "MLmodel"


class MlflowSource:
    """The MLflow adapter of :class:`modelserve.ports.ModelSource`.

    ``url`` is the tracking URI; without it MLflow's own configuration counts (``MLFLOW_TRACKING_URI``).
    """

    def __init__(self, url: str | None = None) -> None:
        self._mlflow = plugins.require("mlflow")
        self._url = url
        with _translated("its tracking URI"):
            self._client = self._mlflow.MlflowClient(tracking_uri=url, registry_uri=url)

    def locate(self, uri: str) -> SourceVersion:
        """Return the version that a ``models:/`` URI means now.

        Raises ``InvalidInput`` for another URI or one that MLflow does not know, ``BackendUnavailable``.
        """
        asked = _URI.fullmatch(uri)
        if asked is None:
            problem = f"{uri[:200]!r} names no version; write models:/NAME/VERSION or models:/NAME@ALIAS"
            raise InvalidInput("uri", problem)
        with _translated(uri):
            if asked["alias"]:
                found = self._client.get_model_version_by_alias(asked["name"], asked["alias"])
            else:
                found = self._client.get_model_version(asked["name"], asked["version"])
        name, version = str(found.name), str(found.version)
        concrete = f"models:/{name}/{version}"
        tags = {"mlflow.source": concrete, "mlflow.model_version": version}
        if found.run_id:
            tags["mlflow.run_id"] = str(found.run_id)
        return SourceVersion(uri=concrete, name=name, version=version, metrics=self._metrics(found.run_id), tags=tags)

    def fetch(self, found: SourceVersion, folder: Path, *, allow_pickle: bool) -> SourceModel:
        """Download a version and open as much of it as is safe, or allowed.

        Raises ``InvalidInput`` for what cannot be served, ``ArtifactUnsafe`` for a pickle that is not allowed.
        """
        with _translated(found.uri):
            place = self._mlflow.artifacts.download_artifacts(
                artifact_uri=self._files_of(found), dst_path=str(folder), tracking_uri=self._url
            )
        root = Path(place).resolve()
        description = _description(root)
        signature = signature_of(description)
        opened = open_model(root, description, allow_pickle=allow_pickle)
        return SourceModel(
            model=opened.model,
            framework=opened.framework,
            method=opened.method,
            format=opened.format,
            signature=None if signature is None else signature.to_json(),
            example=example_of(root, description, signature),
        )

    def _files_of(self, found: SourceVersion) -> str:
        """Return where the files lie. A models:/ URI would be looked up at MLflow's default place, not at this one."""
        uri = str(self._client.get_model_version_download_uri(found.name, found.version))
        if not uri.startswith(_LOGGED_MODEL):
            return uri
        return str(self._client.get_logged_model(uri.removeprefix(_LOGGED_MODEL)).artifact_location)

    def _metrics(self, run_id: str | None) -> dict[str, Json]:
        """Return the metrics of a run: none where it was deleted, and none that JSON has no number for."""
        if not run_id:
            return {}
        with _translated("the run"):
            try:
                metrics = self._client.get_run(run_id).data.metrics
            except self._mlflow.exceptions.MlflowException as error:
                if error.error_code in _NOT_THERE:
                    return {}
                raise
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _description(root: Path) -> Mapping[str, Any]:
    yaml = plugins.require("yaml")
    try:
        description = yaml.safe_load((root / _DESCRIPTION).read_bytes())
    except FileNotFoundError as error:
        raise InvalidInput("model", "the version holds no file MLmodel: it is no model of MLflow") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidInput("model", "its file MLmodel cannot be read") from error
    if not isinstance(description, dict) or not isinstance(description.get("flavors"), dict):
        raise InvalidInput("model", "its file MLmodel describes no flavors")
    return description


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn MLflow's exceptions into ours. Their text may hold hosts and passwords; it stays in the cause."""
    try:
        yield
    except ModelServeError:
        raise
    except Exception as error:
        code = getattr(error, "error_code", None)
        if code in _NOT_THERE:
            raise InvalidInput("uri", f"MLflow does not know {what}") from error
        raise BackendUnavailable("MLflow", f"{code or type(error).__name__} on {what}") from error
