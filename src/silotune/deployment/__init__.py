"""Real clients: a server that stays up, clients that stay joined, and a rehearsal of both.

Does not know the terminal.
"""
