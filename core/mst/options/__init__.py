"""Every option of a training request, one group a module."""
