"""Calls to backends that may be slow or down: time limits and circuit breakers."""
