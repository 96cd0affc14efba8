"""The execution engine: the replicas of a model, kept alive in pools of threads or processes."""
