"""From a path to each client's checked rows: formats, partitioning, chat templates.

Does not know models or rounds.
"""
