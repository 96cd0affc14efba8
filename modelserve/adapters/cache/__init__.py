"""One shared cache per file, each satisfying :class:`modelserve.ports.Cache`."""
