"""Training and scoring on one machine: tasks, the local loop, generation, server-side training.

Does not know about clients or rounds.
"""
