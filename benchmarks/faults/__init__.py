"""Faults on purpose, for ``benchmarks/reliability.py``: each module is a part, with a function that returns its section."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
