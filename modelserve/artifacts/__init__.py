"""Artifacts by content: a store shared by all, and a disk cache on each machine. Every byte is checked before use."""

from modelserve.artifacts.disk_cache import DiskCache, Lease, default_cache_folder
from modelserve.artifacts.pruning import CacheEntry, Examined
from modelserve.artifacts.store import ArtifactStore
from modelserve.artifacts.transfer import DOWNLOAD_LIMIT_S

__all__ = [
    "DOWNLOAD_LIMIT_S",
    "ArtifactStore",
    "CacheEntry",
    "DiskCache",
    "Examined",
    "Lease",
    "default_cache_folder",
]
