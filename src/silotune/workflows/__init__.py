"""One file or folder per command: check, preview, run, plan, compare, sweep, evaluate, audit.

Does not know deployment or the terminal.
"""
