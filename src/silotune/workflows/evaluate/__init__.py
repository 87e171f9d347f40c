"""`silotune evaluate`: questions with known answers, asked of a finished run."""
