"""From files to token ids with labels: formats, templates, spans, encoding."""
