"""`silotune compare`: train the arms of a comparison, and report what they show."""
