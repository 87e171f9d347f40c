"""Values that travel, what an algorithm is, tree arithmetic, seeds, statistics, errors, files.

Knows no model library, and nothing about models, rows or rounds.
"""
