"""Finding a model on this machine, knowing it without torch, and loading it."""
