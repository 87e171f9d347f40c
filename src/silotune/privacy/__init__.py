"""Differential privacy: clipping, noise, accountants, and guards around an algorithm or a step.

Does not know who calls it, and nothing about files.
"""
