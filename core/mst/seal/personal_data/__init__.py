"""Personal data in data files: found by checksum, form and field, counted, and masked."""
