"""One machine-learning framework per file, each satisfying :class:`modelserve.ports.Framework`."""
