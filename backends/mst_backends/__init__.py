"""Device backends that come with mst: one chip family a module."""
