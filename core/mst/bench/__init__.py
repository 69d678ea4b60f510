"""The benchmark matrix: real runs of mst over models, methods, lengths, batches and devices."""
