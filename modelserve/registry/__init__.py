"""The registry: which versions of which models there are, and which one is wanted in production."""

from modelserve.registry.registry import Registry

__all__ = ["Registry"]
