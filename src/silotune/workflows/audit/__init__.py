"""`silotune audit`: attack a private run or recipe, and compare the result with its claim."""
