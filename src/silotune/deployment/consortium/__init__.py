"""Who belongs to a consortium, and how it is proven: keys, requests, kits, and the gate."""
