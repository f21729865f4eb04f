"""python run_recbole_llm.py --model=LoRACocktail --dataset=ml-100k"""

from recbole_llm.cli import main

if __name__ == "__main__":
    main()
