"""Export targets that come with mst: one target a module."""
