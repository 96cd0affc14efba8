"""One carrier of change hints per file, each satisfying :class:`modelserve.ports.ChangeHints`."""
