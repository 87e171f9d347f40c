"""`silotune sweep`: one recipe many times, and what came out."""
