"""python run_recbole_llm.py --model=LoRACocktail --dataset=ml-100k (the same as: recbole-llm run ...)"""

import sys

from recbole_llm.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
