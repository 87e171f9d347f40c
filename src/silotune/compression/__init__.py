"""Codecs: a change as fewer bytes, and back. Pure functions on tensors, one file per codec.

Does not know what a change means, how bytes are carried, or who sends them.
"""
