"""Where mst keeps what it can make again."""

from __future__ import annotations

from pathlib import Path


def cache_dir() -> Path:
    """Return the user's cache: converted models, never data. XDG_CACHE_HOME moves it."""
    import platformdirs

    return platformdirs.user_cache_path("mst")
