"""A chip whose plugin needs a library that is not installed."""

from __future__ import annotations

raise ImportError("libsimchip.so.2: cannot open shared object file")
