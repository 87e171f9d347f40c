"""Flower without a model."""
