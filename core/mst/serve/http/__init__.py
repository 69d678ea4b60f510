"""The HTTP side of `mst serve`: OpenAI's API, spoken inside the jail and heard on this machine."""
