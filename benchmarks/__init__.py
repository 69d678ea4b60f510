"""Measurements: each prints one JSON line a case; dated runs lie in results/."""
