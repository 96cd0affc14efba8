"""The tables, a module per capability. The migrations create them; a test compares the two."""

from __future__ import annotations

from typing import Final

from modelserve.database.tables.columns import metadata
from modelserve.database.tables.inference_log import inference_log
from modelserve.database.tables.lease import lease
from modelserve.database.tables.registry import deployment, deployment_event, model_version

VERSION_TABLE: Final = "modelserve_alembic_version"  # the host may keep an alembic_version of its own
HEAD: Final = "0002"

__all__ = [
    "HEAD",
    "VERSION_TABLE",
    "deployment",
    "deployment_event",
    "inference_log",
    "lease",
    "metadata",
    "model_version",
]
