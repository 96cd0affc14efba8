"""Turning a fitted model into another format, one conversion each: :class:`modelserve.ports.Converter`."""
