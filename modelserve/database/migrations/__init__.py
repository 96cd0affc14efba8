"""Alembic migrations of the registry's tables; run by :meth:`modelserve.registry.Registry.upgrade`."""
