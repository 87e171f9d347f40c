"""`silotune plan`: what a run would cost in bytes, memory and time, before it starts."""
