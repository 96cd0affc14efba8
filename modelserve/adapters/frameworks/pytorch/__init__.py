"""PyTorch: exported programs, and weights for a network that the user's own code builds. One file per format."""

from modelserve.adapters.frameworks.pytorch.adapter import PyTorchFramework

__all__ = ["PyTorchFramework"]
