"""One kind of object store per file, each satisfying :class:`modelserve.ports.ObjectReader`."""
