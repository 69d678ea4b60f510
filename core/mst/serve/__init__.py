"""Serving a model: an engine that answers many prompts at once, and what speaks HTTP for it."""
