"""The command `mst`."""
