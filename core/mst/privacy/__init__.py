"""Differential privacy: how much the tuned weights can tell of any one row, or of one person."""
