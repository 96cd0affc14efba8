"""Rows of a registry, made up."""

from __future__ import annotations

import datetime as dt

from modelserve.types import Artifact, ModelVersion


def version_of(model_name: str = "churn", version: str = "1.4.2", sha256: str = "5f" * 32) -> ModelVersion:
    """Make a registry's version, of which only these three matter."""
    return ModelVersion(
        id=1,
        model_name=model_name,
        version=version,
        framework="sklearn",
        artifact=Artifact(key="", sha256=sha256, size=1, format="skops"),
        signature={},
        load_options={},
        example=None,
        conversion=None,
        metrics={},
        tags={},
        status="staging",
        created_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    )
