"""What is kept of answers for whoever looks at them later: the inference log, and metrics."""
