"""Base model and adapter: fetch, load, quantize, read, write, GGUF.

Does not know rows or clients.
"""
