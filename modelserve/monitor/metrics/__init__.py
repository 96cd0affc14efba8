"""Metrics: counters, their text format, and their sum over the processes of a host."""
