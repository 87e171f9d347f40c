"""`silotune evaluate`: ask a finished run questions with known answers."""
