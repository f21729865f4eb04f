"""Faults on purpose, for ``benchmarks/reliability.py``: each module is a part, with a function that returns its section."""
