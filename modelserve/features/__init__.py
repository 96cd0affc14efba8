"""Features by the keys of their entities: how a model declares them, how they lie in a store, how a row is completed.

``declaration`` is what a user writes; ``layout`` is the one way in which rows are named and values written, for who
publishes and for who serves; ``plan`` is what a version makes of the declaration; ``writer`` publishes; ``breaker``
decides when a store is left alone for a while.
"""

from __future__ import annotations

from modelserve.features.declaration import Features
from modelserve.features.writer import FeatureWriter

__all__ = ["FeatureWriter", "Features"]
