"""Where models come from and go to: what is refused, converted, signed, verified and listed."""
