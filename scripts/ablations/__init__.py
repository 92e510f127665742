"""The findings of automatic clipping at small scale: the parts behind ``scripts/ablation.py``.

From the bottom: ``features`` (frozen embeddings, three splits), ``training`` (private training of a head,
every step the product's release), ``checks`` (verdicts from numbers), ``drawing``; above them one
module a finding, and ``summary`` over all that were measured.
"""
