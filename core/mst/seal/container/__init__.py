"""Encrypted data files: a header, segments under AES-256-GCM, and an index of the rows."""
