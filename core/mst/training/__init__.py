"""The training loop: batches, loss, schedule, checkpoints, and the worker process that runs it."""
