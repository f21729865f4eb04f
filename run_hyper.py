"""python run_hyper.py --model=SASRec --dataset=ml-100k --params_file=properties/search/SASRec.hyper"""

from recbole_llm.leaderboard.cli import tune

if __name__ == "__main__":
    tune()
