"""Both halves of a round, and what they keep: sampling, acceptance, run folder, ledgers, guarantee.

A client's own configuration is here too. Does not know the network or Flower.
"""
