"""`silotune sweep`: train one recipe many times, and compare the results."""
