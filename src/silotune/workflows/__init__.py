"""One file or folder per command: check, preview, run, plan, compare, sweep, evaluate, audit.

It does not know deployment or the terminal.
"""
