"""The servers that the entry points start: an application has one of them, the one of the way that it is served.

Which models, and from where, is read from the environment (``MODELSERVE_REGISTRY``, ``MODELSERVE_ARTIFACTS``) or from
the file that ``MODELSERVE_CONFIG`` names.
"""

from __future__ import annotations

import os

import modelserve as ms

CONFIG = os.environ.get("MODELSERVE_CONFIG")

server = ms.AsyncModelServer.from_config(CONFIG)
sync_server = ms.ModelServer.from_config(CONFIG)
