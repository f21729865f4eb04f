"""The texts of ``recbole-llm --help`` and of the help of its commands."""

ABOUT = """Published LLM recommenders as RecBole models.

Arguments have the form --key=value. Numbers, lists and dictionaries are written as in Python, --topk="[1, 5]", and several paths
are separated by spaces, --config_files="a.yaml b.yaml". Only the options of a command may also be written as --key value.
All commands but evaluate, recommend, look, share, merge, forecast, doctor, cache and data convert accept every key of RecBole and
of properties/*.yaml. Command-line values override property files, and later files override earlier ones."""

END = """
exit codes: 0 (success), 1 (runs of a leaderboard failed, claims have no result, or the doctor found a problem),
2 (error), 130 (Ctrl-C), 141 (nothing reads the output any more), 143 (SIGTERM). RECBOLE_LLM_TRACEBACK=1 shows the traceback.
"""

RUN = """
Train and evaluate one model, an LLM recommender or any model of RecBole, on one dataset. All models are evaluated on the same
candidates. Stages that an earlier run has trained are reused, and a killed run resumes in its stage. The results are printed as a
table and written to saved/runs/<run>/record.json. python run_recbole_llm.py is the same command."""

DATA = "  --data_path=DIR              folder that contains <dataset>/<dataset>.inter and .item (ml-100k comes with RecBole)\n"
SAVED = "  --checkpoint_dir=saved       folder of stages, candidates and run records\n"
RUN_KEYS = f"""
keys, with their defaults; properties/*.yaml and the documentation of RecBole describe all keys:
{DATA}{SAVED}"""
RUN_KEYS += """\
  --seed=2020                  random seed of everything but the candidates; --gpu_id=0, --show_progress=True
  --epochs=300                 epochs of a classical model; --train_batch_size=2048, --learning_rate=0.001
  --eval_args="{'mode': 'candidates'}"  {'mode': 'full'} ranks the whole catalogue; see docs/protocol.md
  --candidates="{'source': 'uniform', 'num_negatives': 19, 'seed': 2020}"
  --metrics="['Hit', 'NDCG', 'MRR']"    --topk="[1, 3, 5, 10]", --valid_metric=NDCG@10
  --eval_users=null            number of evaluation users; null: all
  --llm=null                   a backbone of properties/llm (null: builtin); --llm_path=FOLDER_OR_HUB_ID for others
  --text_encoder=null          a text encoder of properties/text_encoder (null: builtin); for ALLMRec, AlphaRec, NearestTexts
  --adapters={}                PEFT folders in place of the training of adapters, such as "{'base spirit': 'lora'}"
  --general_datasets=[]        datasets of the base-spirit LoRA, such as "['amazon-toys']"; --source_datasets=[] (WeaveRec)
  --merge=entropy              merging method of LoRACocktail; see docs/merging.md
  --scoring=likelihood         published: also the paper's metrics of generated answers; see docs/protocol.md
  --save_predictions=False     write predictions.parquet beside the record, see docs/models/imported.md
  --init_from=null             folder of the run that the model is initialised from (Laser)
  --new_items=null             scenario with new items; also --cold_users, --train_users, --train_dataset

examples:
  recbole-llm run --model=LoRACocktail --dataset=ml-100k
  recbole-llm run --model=SASRec --dataset=ml-1m --data_path=DIR --eval_args="{'mode': 'full'}"
"""

PLAN = """
Show what a run costs, without training and without reading weights: its stages and which are cached, samples, optimiser steps,
exact token counts, parameters, peak memory, floating-point operations, and time on this machine (measured for some seconds) or on
a named card. Of an LLM, config.json and the tokenizer's files are enough. See docs/plan.md."""

PLAN_KEYS = f"""
keys are those of recbole-llm run, and
{DATA}{SAVED}  --probe_seconds=20           longest measurement of this machine
  --plan_efficiency=0.4        assumed share of a card's peak

examples:
  recbole-llm plan --model=LoRACocktail --dataset=ml-100k
  recbole-llm plan --model=LoRACocktail --dataset=ml-100k --llm=qwen2-7b --device=4090
"""

LEADERBOARD = """
Run the models, seeds and protocols of a property file (docs/leaderboard.md), and write a table with paired tests for each
protocol, as JSON, Markdown, CSV, LaTeX and HTML. A run whose record exists is not repeated. Failed runs are reported and do not
stop the others. The tables are printed to standard output, the log to standard error."""

LEADERBOARD_KEYS = f"""
keys of every run, which override those of the file:
{DATA}{SAVED}
examples:
  recbole-llm leaderboard --config_files=properties/leaderboard/ml-100k.yaml --jobs=2
  recbole-llm leaderboard --config_files=mine.yaml --data_path=DIR --show
"""

REPLICATE = """
Test the claims of papers that the files of properties/claims name: run what has no record, test each claim on the same users,
and write the page of all claims (docs/replication.md) from its results (replication.json). Claims that were not run keep their
results. A claim that was changed after its run is marked on the page. With --claim, only the runs that the claim reads are
made."""

REPLICATE_KEYS = f"""
keys of every run, which override those of the files and are shown with the result:
{DATA}{SAVED}
examples:
  recbole-llm replicate --show
  recbole-llm replicate --data_path=DIR --jobs=2
  recbole-llm replicate reccocktail-ml-100k --claim="products above factors"
  recbole-llm replicate reccocktail-ml-100k --llm=qwen2-7b --eval_users=null --out=replication-qwen2-7b
"""

EVALUATE = """
Evaluate the model of a finished run once more, without training: with other metrics, on other candidates or users, or in a full
ranking. The new record is written beside that of the run. Only keys of the evaluation can be given; all
others are those of the run."""

EVALUATE_KEYS = """
keys: metrics, topk, eval_args (the mode of the test), candidates, eval_users, slices, mask_history, save_predictions,
predictions_topk, retriever, retriever_config, retriever_top, scoring, scorer, normalize, shuffled_title_control, eval_batch_size

examples:
  recbole-llm evaluate --run=saved/runs/SASRec-ml-1m-1234abcd --topk="[5, 20, 50]"
  recbole-llm evaluate --run=saved/runs/SASRec-ml-1m-1234abcd --eval_args="{'mode': 'full'}" --save_predictions=True
"""

RECOMMEND = """
Show a user's history and what the model of a finished run recommends, with titles and scores. The whole history counts, the test
item included, and its items are left out. A re-ranker ranks its retriever's best items; if the run has no retriever, because it
was evaluated on candidates, the retriever is trained first. Nothing else is trained."""

RECOMMEND_KEYS = """
scores are comparable for one user alone. The columns of a file are user, rank, item, title and score. --index is for models that
score by the product of two vectors (SASRec, BPR, LightGCN, Laser, ...); the recall of an index that is not exact is shown.

examples:
  recbole-llm recommend --run=saved/runs/SASRec-ml-100k-1234abcd --user=196
  recbole-llm recommend --run=saved/runs/TALLRec-ml-100k-1234abcd --history="Toy Story|Fargo|Braveheart" --top=5
  recbole-llm recommend --run=saved/runs/BPR-ml-100k-1234abcd --users=users.txt --out=top10.parquet --index=HNSW32
"""

LOOK = """
Write one HTML file that shows several runs side by side for users of the test split: the history, what each model ranks highest,
and the rank of the target, with filters and a search. The runs must have the same split, users and candidates. Nothing is
trained. See docs/look.md."""

LOOK_KEYS = """
examples:
  recbole-llm look --runs saved/runs/SASRec-ml-100k-1234abcd saved/runs/LoRACocktail-ml-100k-1234abcd
  recbole-llm look --runs tuned=saved/runs/TALLRec-ml-100k-1234abcd --rows "no adapter" --users=500 --out=tallrec.html
"""

TUNE = """
Search the hyper-parameters of one model on one dataset by the validation score, and write the best settings to a property file
for --config_files. Each evaluation is an ordinary run; a run whose record exists is not repeated. Requires optuna."""

TUNE_KEYS = f"""
a line of the search file has the form of RecBole, `key kind values`:
  learning_rate loguniform -8, -5         natural logarithms of the bounds
  hidden_dropout_prob choice [0.2, 0.5]   also: uniform LOW, HIGH and quniform LOW, HIGH, STEP

keys of every run, with their defaults:
{DATA}{SAVED}  --seed=2020                  random seed of the search, and of its runs unless --seeds is given
  --valid_metric=NDCG@10       metric that decides

examples:
  recbole-llm tune --model=SASRec --dataset=ml-100k --params_file=properties/search/SASRec.hyper
  recbole-llm tune --model=BPR --dataset=ml-100k --params_file=properties/search/BPR.hyper --algo=random --max_evals=8 --epochs=40
"""

MERGE = """
Merge LoRA adapters of one base model into one PEFT adapter with a record of its sources. Methods that measure scores (entropy,
grid, likelihood, auto, ...) are available only in a run: recbole-llm run --merge=entropy. See docs/merging.md."""

MERGE_KEYS = """
examples:
  recbole-llm merge --adapters="base=runs/a/lora own=runs/b/lora" --merge=ties --density=0.3 --out=merged
  recbole-llm merge --adapters="lora_a lora_b" --merge=fixed --weights="[0.3, 0.7]" --out=merged --full_model=full
"""

FORECAST = """
Test, over the records of many runs of LoRACocktail, MoLoRec and WeaveRec, whether features of the adapters that are known before
the merge (angles and norms of their updates, their entropies, the words of their titles) predict its gain over the better
adapter. Nothing is trained. Runs that differ only in their seed are one point. See docs/merging.md."""

FORECAST_KEYS = """
examples:
  recbole-llm forecast saved/runs
  recbole-llm forecast saved/runs other/saved/runs --metric=ndcg@10 --out=docs/forecast
"""

SHARE = """
Write a finished run so that others can load it, as a folder or on the Hugging Face hub: adapters or weights, settings, record,
passport, curves, and a model card with the measured table. No rows of data, no ids of users, no paths. See docs/share.md."""

SHARE_KEYS = """
examples:
  recbole-llm share saved/runs/LoRACocktail-ml-100k-1234abcd --to=shared
  recbole-llm share saved/runs/LoRACocktail-ml-100k-1234abcd --to=hub:me/cocktail --license=mit --private
  recbole-llm recommend --run=hub:me/cocktail --user=196
"""

EXPORT = """
Write the training prompts of each adapter of a model, and the prompts of the evaluation users with their candidates, as JSONL for
LLaMA-Factory and other trainers and inference engines, without training anything. See docs/export.md."""

EXPORT_KEYS = f"""
keys, as for recbole-llm run:
{DATA}{SAVED}  --llm=null                   a backbone of properties/llm; --llm_path=FOLDER_OR_HUB_ID for others

examples:
  recbole-llm export --model=LoRACocktail --dataset=ml-100k --llm=qwen2-7b --out=prompts
  recbole-llm export --model=TALLRec --dataset=ml-100k --llm_path=DIR --layout=alpaca --passes=4 --out=prompts
"""

VIEWS = """
Split a dataset by category into datasets <dataset>-<category>, which any model can use. No item is in two of them. Do not test
a model on a view if it was trained on the whole dataset, which contains the test items of the view."""

VIEWS_KEYS = f"""
keys, with their defaults:
{DATA}  --domain_field=null          column of the categories; null: category_field
  --domain_min_users=100       minimum number of users with two or more items in a view
  --domain_max_views=2         number of views, largest categories first

examples:
  recbole-llm views --dataset=ml-100k --domain_max_views=3
  recbole-llm views --dataset=mydata --data_path=DIR --category_field=genre --out=views
"""

SPLITS = """
Make a dataset from your own files, and describe a dataset as the models read it: filtered and split."""

CONVERT = """
Make a dataset (RecBole's atomic files and a property file) from a table of interactions, CSV, TSV, JSON lines or Parquet, or from
a release as it is downloaded: MovieLens, Amazon reviews of 2014, 2018 and 2023, Steam, Yelp, Goodreads, Last.fm (HetRec), MIND.
How the columns are read is printed first. Files are read as streams, also from .gz and .zip. Nothing is overwritten."""

CONVERT_KEYS = """
examples:
  recbole-llm data convert songs.csv --to=songs
  recbole-llm data convert plays.parquet --items=tracks.csv --columns="{'user': 'uid', 'item': 'track'}" --to=plays --k_core=5
releases: recbole-llm data convert ml-1m.zip --to=films; data convert reviews_Beauty_5.json.gz --to=beauty --description
"""

DESCRIBE = """
Describe a dataset in words and, with --picture, in one picture: users, items and interactions, times and ties, repeats, cold
items, titles and their lengths in tokens, and what each family of models needs and whether it is there. Nothing is trained."""

DESCRIBE_KEYS = f"""
keys, as for recbole-llm run; those of the data and the split matter, and
{DATA}  --llm=null                   the backbone whose tokens are counted (null: builtin); --llm_path=FOLDER_OR_HUB_ID

examples:
  recbole-llm data describe ml-100k
  recbole-llm data describe ml-1m --data_path=DIR --llm=smollm2-135m --picture=ml-1m.png
"""

PASSPORT = """
Print the identity of a split and store it as <checkpoint_dir>/passports/<dataset>-<hash>.json: counts before and after the
filters, the keys that shaped it, ties, and hashes, some of which do not depend on ids, on the order of rows or on the form of the
file. The split is compared with those of properties/splits. Every run record contains its passport. See docs/protocol.md."""

PASSPORT_KEYS = f"""
keys, among them all that shape a split:
{DATA}{SAVED}  --rm_dup_inter=first         of repeated interactions, the one that stays; null keeps all
  --user_inter_num_interval="[5,inf)" --item_inter_num_interval="[5,inf)"   the 5-core
  --eval_args="{{'split': {{'RS': [0.8, 0.1, 0.1]}}}}"   another split than leave-one-out

examples:
  recbole-llm data passport --dataset=ml-100k
  recbole-llm data passport --dataset=mydata --data_path=DIR --user_inter_num_interval="[5,inf)"
"""

HANDOVER = """
Write the split of a dataset for other frameworks: RecBole's atomic files, whole and pre-split, tables with RecTools' columns,
Parquet tables of the training, validation and test interactions, the item texts, and the candidates. A model that is trained on
them hands its predictions back to recbole-llm run --model=Imported. See docs/models/imported.md."""

HANDOVER_KEYS = f"""
keys, as for recbole-llm run; those of the data, the candidates and eval_args matter:
{DATA}{SAVED}
examples:
  recbole-llm data export --dataset=ml-100k --out=split
  recbole-llm data export --dataset=mydata --data_path=DIR --eval_args="{{'mode': 'full'}}" --out=split
"""

DOCTOR = """
Show what is installed and on which machine: versions of required packages against those that are allowed and tested, what is
installed for which feature, devices, threads, memory, disk and what lies under checkpoint_dir. Every required package is
imported once. Each problem has its remedy; the exit code is 1 if something that is required is missing or broken."""

DOCTOR_KEYS = """
examples:
  recbole-llm doctor
  recbole-llm doctor --checkpoint_dir=saved
"""

CACHE = """
List or clean what runs keep under checkpoint_dir: stages, scores, text vectors, backbones, candidates and records."""

CACHE_LIST = """
Show what lies under checkpoint_dir, with sizes, and what is left over: temporary files of processes that have ended, checkpoints
and weights of runs that were killed, and stages that no run record names."""

CACHE_LIST_KEYS = """
examples:
  recbole-llm cache list
  recbole-llm cache list --checkpoint_dir=saved
"""

CACHE_CLEAN = """
Remove what killed runs have left under checkpoint_dir: temporary files, the checkpoints from which the runs would resume, and
.pth files of classical models that no record names. Files of a process that is alive stay, as do results. --unused also removes
the stages that no run record names, such as those of earlier code; a run that needs one of them computes it again."""

CACHE_CLEAN_KEYS = """
examples:
  recbole-llm cache clean
  recbole-llm cache clean --unused
"""
