"""`mst bug-report`: what a maintainer needs to know, and nothing of anybody's data."""
