"""`silotune compare`: trains the arms of a comparison, and says what they show."""
