"""Artifacts by content: a store shared by all, and a disk cache on each machine. Every byte is checked before use."""

from modelserve.artifacts.disk_cache import DiskCache, Lease, default_cache_folder
from modelserve.artifacts.store import ArtifactStore

__all__ = ["ArtifactStore", "DiskCache", "Lease", "default_cache_folder"]
