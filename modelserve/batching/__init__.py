"""Concurrent calls run as one: the queue, its batches, admission and cost. Nothing here knows what a model is."""
