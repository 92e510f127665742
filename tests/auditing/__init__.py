"""Audits of runs with faults planted in them: which layer sees which."""
