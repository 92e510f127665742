"""What privacy costs in time and memory: the parts behind ``scripts/benchmark.py``.

From the bottom: ``device`` and ``report`` (no model code), ``cases`` (models and
batches), ``contenders`` (training steps), ``measure`` (clock, memory, processes of
their own); above them one module a mode, ``steps``, ``scaling``, ``throughput``, ``overhead``.
"""
