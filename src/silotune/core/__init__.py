"""Shared values, the algorithm interface, tree arithmetic, seeds, statistics, errors, file writing.

Does not know any model library, and nothing about models, rows or rounds.
"""
