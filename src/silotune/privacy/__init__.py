"""Differential privacy: what is done to updates so that they tell less, and what that is worth."""
