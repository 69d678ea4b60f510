"""Export targets and serving engines that come with mst: one a module."""
