"""One outside technology per file, named in :mod:`modelserve.plugins` and imported only when asked for."""
