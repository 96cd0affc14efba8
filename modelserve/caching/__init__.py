"""Predictions that were computed before, and those that are being computed now.

``predictions`` is what a request goes through; ``memory`` keeps values in this process, ``shared`` uses a cache that
other processes use too in such a way that it cannot hurt, ``tiers`` puts one before the other; ``envelope`` is the form
of a value, ``flights`` lets concurrent requests share one execution.
"""

from __future__ import annotations

from modelserve.caching.memory import MemoryCache
from modelserve.caching.predictions import PredictionCache
from modelserve.caching.tiers import Tiers

__all__ = ["MemoryCache", "PredictionCache", "Tiers"]
