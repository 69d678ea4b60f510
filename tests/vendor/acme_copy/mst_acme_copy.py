"""A backend that takes the entry point name of another vendor."""

from mst_acme import mst_backend_name, mst_capabilities, mst_probe

__all__ = ["mst_backend_name", "mst_capabilities", "mst_probe"]
