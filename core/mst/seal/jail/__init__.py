"""The jail: a job and all it starts, shut off from every network by the kernel."""
