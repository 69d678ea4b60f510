"""How quantized weights lie in a checkpoint: one layout a module, and the rounding they share."""
