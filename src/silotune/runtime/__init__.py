"""Connects the two halves of a round: in one process, or over Flower in `flower/`.

Does not know results or workflows.
"""
