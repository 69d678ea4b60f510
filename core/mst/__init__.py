"""MST, the Multi-Silicon Trainer."""

__version__ = "0.1.0"
