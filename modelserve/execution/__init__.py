"""The execution engine: batches, the pools of replicas that run them, and what bounds them."""
