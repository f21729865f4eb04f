"""Claims of papers, each written down before its runs, tested, and shown on one page: ``recbole-llm replicate``."""
