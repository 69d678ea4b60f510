"""`mst models pull`: the one part of mst that talks to a host that is not this machine."""
