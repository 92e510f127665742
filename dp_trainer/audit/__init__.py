"""Attacks a configured run and compares what it achieves with what the run claims.

Three layers, each able to refute the claim and none able to prove it: ``exact``
(contributions, noise and draws, measured), ``step`` (telling one release with a
canary from one without) and ``one_run`` (many canaries in one training run).
"""
