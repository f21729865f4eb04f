"""``python -m recbole_llm.cli``, as launchers of several processes start it."""

from recbole_llm.cli import main

if __name__ == "__main__":
    main()
