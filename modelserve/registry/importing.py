"""Taking models over from another registry: downloaded once, registered here, and served from here alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelserve import plugins
from modelserve.errors import NotFound, VersionExists
from modelserve.ports import SigningKey
from modelserve.registry import Registry
from modelserve.registry.names import check_names
from modelserve.signature import Signature
from modelserve.types import ModelVersion


def import_model(
    registry: Registry,
    source: str,
    uri: str,
    *,
    source_url: str | None = None,
    name: str | None = None,
    version: str | None = None,
    example: Any = None,
    method: str | None = None,
    trusted: Sequence[str] = (),
    allow_pickle: bool = False,
    signing_key: str | Path | SigningKey | None = None,
    actor: str | None = None,
    reason: str = "",
) -> ModelVersion:
    """Copy a version of another registry into ``registry``, in staging, with its metrics and where it came from.

    ``source`` names the kind of the other registry (``"mlflow"``), ``uri`` the model in it
    (``"models:/churn@champion"``), ``source_url`` where it is (None: what its own configuration says). ``name`` and
    ``version`` are what it is called here, by default as there; ``example``, ``method``, ``trusted`` and
    ``signing_key`` are those of :meth:`Registry.register`, by default what the source knows of the first two. A model
    that is a pickle is opened only with ``allow_pickle``, here and now, and registered in its framework's safe format.

    Raises ``InvalidInput`` for an unknown URI or what cannot be served, ``VersionExists`` for a version that was
    imported before, ``ArtifactUnsafe`` for a pickle, ``BackendUnavailable`` when the source does not answer.
    """
    origin = plugins.source(source, source_url)
    found = origin.locate(uri)
    model_name, new_version = name or found.name, version or found.version
    check_names(model_name, new_version)
    _refuse_existing(registry, model_name, new_version)
    with tempfile.TemporaryDirectory(prefix="modelserve-import-") as folder:
        model = origin.fetch(found, Path(folder), allow_pickle=allow_pickle)
        return registry.register(
            model_name,
            new_version,
            model.model,
            example=model.example if example is None else example,
            signature=None if model.signature is None else Signature.from_json(model.signature),
            framework=model.framework,
            method=method or model.method,
            trusted=trusted,
            format=model.format,
            metrics=found.metrics,
            tags=found.tags,
            signing_key=signing_key,
            actor=actor,
            reason=reason or f"imported from {found.uri}",
        )


def _refuse_existing(registry: Registry, model_name: str, version: str) -> None:
    """Tell before anything is downloaded."""
    try:
        registry.get(model_name, version)
    except NotFound:
        return
    raise VersionExists(model_name, version)
