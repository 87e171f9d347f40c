"""Who belongs to a consortium, and how a client proves it: keys, requests, kits and the gate."""
