"""`silotune audit`: attacks a private run or recipe, and compares what they show with the claim."""
