"""`silotune contribution`: how much each client's updates improved the others."""
