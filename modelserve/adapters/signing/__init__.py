"""One technology of signatures per module."""
