"""python run_leaderboard.py --config_files=properties/leaderboard/ml-100k.yaml"""

from recbole_llm.leaderboard.cli import main

if __name__ == "__main__":
    main()
