"""One feature store per file, each satisfying :class:`modelserve.ports.FeatureStore`."""
