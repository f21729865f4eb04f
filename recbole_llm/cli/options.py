"""The options of each command."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from recbole_llm import __version__, registry
from recbole_llm.cli import commands as do
from recbole_llm.cli import texts
from recbole_llm.cli.errors import fail
from recbole_llm.cli.values import columns, list_of
from recbole_llm.merging.folders import METHODS, READERS

_Group = Any  # of argparse, which does not name the type
_Add = Callable[..., Any]  # add_argument of a command's parser

_FORM: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
_DATASET = "ml-100k, which comes with RecBole, or a dataset in --data_path"
_RUN = "folder of a run, such as saved/runs/SASRec-ml-100k-1234abcd"

# arguments of options that several commands have
_FILES: dict[str, Any] = {"type": str.split, "default": [], "metavar": "FILES", "help": "property files, separated by spaces"}
_CHECKPOINT_DIR: dict[str, Any] = {"type": Path, "default": Path("saved"), "metavar": "DIR", "help": "default: saved"}
# --show is the same as --show=True
_SWITCH: dict[str, Any] = {"nargs": "?", "const": "True", "default": "False", "choices": ("True", "False")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        fail(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which would read ``--show NAME`` as ``--show=NAME``."""
        args = sys.argv[1:] if args is None else args
        switches = {option for action in self._actions if action.const == "True" for option in action.option_strings}
        nexts = zip(args, [*args[1:], ""], strict=False)  # none has no next one
        given = [f"{one}=True" if one in switches and after not in _SWITCH["choices"] else one for one, after in nexts]
        return super().parse_known_args(given, namespace)


def parser() -> argparse.ArgumentParser:
    """The parser of ``recbole-llm``; ``function`` of its result is the command."""
    root_parser = _Parser(prog="recbole-llm", description=texts.ABOUT, epilog=texts.END, **_FORM)
    root_parser.add_argument("--version", action="version", version=f"recbole-llm {__version__}")
    commands = root_parser.add_subparsers(title="commands (see recbole-llm COMMAND --help)", metavar="COMMAND", required=True)
    for add_commands in (_of_runs, _of_results, _of_tuning_and_merging, _of_data, _of_installation):  # in the order of --help
        add_commands(commands)
    return root_parser


def _command(group: _Group, name: str, function: Callable, line: str, about: str, keys: str) -> _Add:
    """Add a command to the parser of the program or of a command that has commands."""
    own = group.add_parser(name, help=line, description=about, epilog=keys + texts.END, **_FORM)
    own.set_defaults(function=function, prog=own.prog)
    return own.add_argument


def _several(add: _Add) -> None:
    """The options of commands that start several runs."""
    add("--jobs", type=int, default=1, help="number of parallel runs, which share the cores (default: 1)")
    engines = ("process", "local", "slurm")
    add("--engine", default="process", choices=engines, help="local, slurm: submitit (default: process)")
    add("--show", **_SWITCH, help="run nothing and show the existing records")


def _of_runs(commands: _Group) -> None:
    """``run``, ``plan``, ``leaderboard`` and ``replicate``."""
    add = _command(commands, "run", do.run, "train and evaluate one model on one dataset", texts.RUN, texts.RUN_KEYS)
    add("--model", "-m", help=f"{', '.join(registry.MODELS)}, a model of RecBole such as SASRec, or your own, file:Class")
    add("--dataset", "-d", help=_DATASET)
    add("--config_files", **_FILES)

    add = _command(commands, "plan", do.plan, "show what a run costs before it is started", texts.PLAN, texts.PLAN_KEYS)
    add("--model", "-m", help="a model, as for recbole-llm run")
    add("--dataset", "-d", help=_DATASET)
    add("--config_files", **_FILES)
    add("--device", metavar="CARD", help="predict the time on this card, such as h100, a100, 4090 (default: this machine)")

    add = _command(
        commands, "leaderboard", do.leaderboard, "compare many models in one table", texts.LEADERBOARD, texts.LEADERBOARD_KEYS
    )
    add("--config_files", type=Path, required=True, metavar="FILE", help="such as properties/leaderboard/ml-100k.yaml")
    _several(add)
    add("--out", type=Path, metavar="DIR", help="output folder (default: <checkpoint_dir>/leaderboard/<file>)")
    add("--page", type=Path, metavar="FILE", help="also write tables and pictures into this Markdown page, between two marks")
    add("--look", nargs="?", type=int, const=5, metavar="N", help="also a page of what the best N rows recommend (5)")

    add = _command(commands, "replicate", do.replicate, "test the claims of papers", texts.REPLICATE, texts.REPLICATE_KEYS)
    add("names", nargs="*", metavar="NAME", help="files of properties/claims without .yaml, or a file of yours (default: all)")
    add("--claim", action="append", default=[], metavar="CLAIM", help="test this claim alone; may be repeated (default: all)")
    _several(add)
    add(
        "--out",
        type=Path,
        default=Path("docs"),
        metavar="DIR",
        help="folder of replication.json, .md and .png (default: docs)",
    )


def _of_results(commands: _Group) -> None:
    """``evaluate``, ``recommend``, ``look`` and ``share``, of finished runs."""
    add = _command(commands, "evaluate", do.evaluate, "evaluate a run with other metrics", texts.EVALUATE, texts.EVALUATE_KEYS)
    add("--run", required=True, metavar="RUN", help=f"{_RUN}, a shared folder, or hub:user/name")
    add("--model", "-m", metavar="MODULE:CLASS", help="the code of the run's model, if it is yours")
    add("--data_path", metavar="DIR", help="folder that contains the dataset, if it has moved")

    add = _command(commands, "recommend", do.recommend, "show what a run recommends", texts.RECOMMEND, texts.RECOMMEND_KEYS)
    add("--run", required=True, metavar="RUN", help=f"{_RUN}, a shared folder, or hub:user/name")
    add("--user", metavar="ID", help="a user of the dataset")
    add("--history", metavar="TEXT", help='titles or ids of items, oldest first, "TITLE|TITLE|TITLE", of any user')
    add("--users", type=Path, metavar="FILE", help="users of the dataset, one id per line")
    add("--top", type=int, default=10, metavar="K", help="number of items for each user (default: 10)")
    add("--candidates", type=Path, metavar="FILE", help="rank these items alone; titles (new ones, too) or ids")
    add("--until", default="now", choices=("now", "test", "valid"), help="end the history before this item (default: now)")
    add("--seen", **_SWITCH, help="also recommend items of the history")
    add("--row", metavar="NAME", help="another row of the run's table, such as ingredient (default: the model)")
    add("--index", default="exact", metavar="KIND", help="exact, or an index of faiss such as HNSW32 or IVF1024,Flat")
    add("--out", type=Path, metavar="FILE", help="write a .parquet, .csv or .jsonl file instead of printing")
    add("--model", "-m", metavar="MODULE:CLASS", help="the code of the run's model, if it is yours")
    add("--data_path", metavar="DIR", help="folder that contains the dataset, if it has moved")
    add("--llm_path", metavar="PATH", help="the LM of the run, if it has moved or the run was shared without it")
    add("--text_encoder_path", metavar="PATH", help="the text encoder of the run, likewise")

    add = _command(commands, "look", do.look, "show what several runs recommend, as a page", texts.LOOK, texts.LOOK_KEYS)
    add("--runs", nargs="+", required=True, metavar="RUN", help="folders of runs, or NAME=RUN for another name than the model's")
    add("--rows", nargs="+", default=[], metavar="ROW", help='also show these rows of the runs, such as "no adapter"')
    add("--out", type=Path, default=Path("look.html"), metavar="FILE", help="default: look.html")
    add("--users", default="200", metavar="N", help="number of users, or a file of user ids, one per line (default: 200)")
    add("--top", type=int, default=10, metavar="K", help="number of items in a list (default: 10)")
    add("--data_path", metavar="DIR", help="folder that contains the dataset, if it has moved")

    add = _command(commands, "share", do.share, "give a run to others, as a folder or on the hub", texts.SHARE, texts.SHARE_KEYS)
    add("run", metavar="RUN", help=_RUN)
    add("--to", required=True, metavar="WHERE", help="a folder that does not exist, or hub:user/name")
    add("--user_ids", **_SWITCH, help="keep the ids of users with their ranks")
    add("--license", metavar="ID", help="licence, such as mit or apache-2.0 (default: that of the base model)")
    add("--private", **_SWITCH, help="create the repository of the hub as a private one")


def _of_tuning_and_merging(commands: _Group) -> None:
    """``tune``, ``merge`` and ``forecast``."""
    add = _command(commands, "tune", do.tune, "search hyper-parameters by the validation score", texts.TUNE, texts.TUNE_KEYS)
    add("--model", "-m", required=True, help="a model, as for recbole-llm run")
    add("--dataset", "-d", required=True, help=_DATASET)
    add("--params_file", type=Path, required=True, metavar="FILE", help="search space, such as properties/search/SASRec.hyper")
    add("--config_files", **_FILES)
    add("--algo", default="exhaustive", choices=("exhaustive", "random", "bayes"), help="default: exhaustive, all combinations")
    add("--max_evals", type=int, metavar="N", help="number of settings for random and bayes (default: 10)")
    add("--seeds", type=list_of(int), metavar="LIST", help='score by the mean over seeds, "[2020, 2021]" (default: --seed)')
    add("--output_file", type=Path, metavar="FILE", help="default: <checkpoint_dir>/tuning/<dataset>/<Model>.yaml")

    add = _command(commands, "merge", do.merge, "merge LoRA adapters into one", texts.MERGE, texts.MERGE_KEYS)
    add("--adapters", type=shlex.split, required=True, metavar="FOLDERS", help='"[NAME=]FOLDER [NAME=]HUB_ID ..."')
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the merged adapter, which must not exist")
    add("--merge", default="uniform", metavar="METHOD", help=f"{', '.join(METHODS)}, package.module:function (default: uniform)")
    add("--weights", type=list_of(int, float), metavar="LIST", help=f"one for each adapter; for {', '.join(READERS['weights'])}")
    add("--density", type=float, metavar="D", help=f"share of entries to keep, default 0.5; for {', '.join(READERS['density'])}")
    add("--residual", type=float, metavar="L", help="weight of the orthogonal parts, default 0.1; for orthogonal_residual")
    add("--seed", type=int, metavar="N", help="random seed, default 0; for dare, dare_ties")
    add("--compress_rank", type=int, metavar="R", help="reduce the result to this rank by SVD (default: exact, no reduction)")
    add("--extrapolate", **_SWITCH, help="allow weights outside [0, 1]")
    add("--full_model", type=Path, metavar="DIR", help="also write the base model with the result folded into its weights")
    add("--base_model", metavar="PATH", help="folder or hub id of the base model, if it is not the one that the adapters name")

    add = _command(
        commands,
        "forecast",
        do.forecast,
        "test whether adapters predict the gain of a merge",
        texts.FORECAST,
        texts.FORECAST_KEYS,
    )
    add("runs", nargs="+", metavar="RUN", help="runs, shared folders, hub:user/name, or folders that contain runs: saved/runs")
    add("--out", type=Path, default=Path("forecast"), metavar="DIR", help="output folder (default: forecast)")
    add("--metric", help="metric of the gain, such as ndcg@10 (default: the first metric of the runs)")


def _of_data(commands: _Group) -> None:
    """``export``, ``views`` and the commands of ``data``."""
    add = _command(commands, "export", do.export, "write a model's prompts as JSONL", texts.EXPORT, texts.EXPORT_KEYS)
    add("--model", "-m", required=True, help="a model that trains adapters: LoRACocktail, MoLoRec, WeaveRec, TALLRec, LlamaRec")
    add("--dataset", "-d", required=True, help=_DATASET)
    add("--config_files", **_FILES)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the files, which must not exist")
    add("--layout", default="messages", choices=("messages", "alpaca"), help="form of a line (default: messages)")
    add("--passes", type=int, default=1, metavar="N", help="epochs to write; their negatives differ (default: 1)")
    add("--ids", **_SWITCH, help="also write the token ids of each line, as input_ids and labels")

    add = _command(commands, "views", do.views, "split a dataset by category into datasets", texts.VIEWS, texts.VIEWS_KEYS)
    add("--dataset", "-d", required=True, help=_DATASET)
    add("--config_files", **_FILES)
    add("--out", type=Path, default=Path("views"), metavar="DIR", help="folder of the new datasets (default: views)")

    data = commands.add_parser(
        "data",
        help="make or describe a dataset, identify or export its split",
        description=texts.SPLITS,
        epilog=texts.END,
        **_FORM,
    )
    of_data = data.add_subparsers(title="commands (see recbole-llm data COMMAND --help)", metavar="COMMAND", required=True)
    add = _command(of_data, "convert", do.data_convert, "make a dataset from your files", texts.CONVERT, texts.CONVERT_KEYS)
    add("source", type=Path, metavar="SOURCE", help="a table of interactions, or a release: its folder, its .zip, its reviews")
    add("--to", required=True, metavar="NAME", help="name of the dataset")
    add("--out", type=Path, default=Path("dataset"), metavar="DIR", help="its parent folder, the data_path (default: dataset)")
    add("--items", type=Path, metavar="FILE", help="a table of items, if their titles are not in SOURCE")
    roles = "user, item, time, rating, title, year, brand, category, description"
    add("--columns", type=columns, default={}, metavar="DICT", help=f"columns of SOURCE by role: {roles}; None: no such column")
    add("--item_columns", type=columns, default={}, metavar="DICT", help="columns of --items: item and the last five of these")
    add("--time_format", metavar="FORMAT", help="format of ambiguous dates, such as '%%d/%%m/%%Y %%H:%%M'")
    add("--encoding", default="utf-8", help="encoding of your tables that are not in UTF-8, such as latin-1")
    add("--k_core", type=int, metavar="K", help="keep users with K different items and items with K users (default: all)")
    add("--min_rating", type=float, metavar="R", help="keep ratings of at least R (default: all)")
    kinds = ("exact", "first", "last", "keep")
    add(
        "--repeats",
        default="exact",
        choices=kinds,
        help="rows of the same user and item: drop those of equal time, keep the first or last, or all (default: exact)",
    )
    add("--drop_incomplete", **_SWITCH, help="leave out rows without a user, an item, a time or a rating")
    add("--description", **_SWITCH, help="also write the descriptions of items")
    add("--show", **_SWITCH, help="show how the columns are read, and write nothing")
    add = _command(of_data, "describe", do.data_describe, "show what a dataset contains", texts.DESCRIBE, texts.DESCRIBE_KEYS)
    add("dataset", metavar="NAME", help=_DATASET)
    add("--config_files", **_FILES)
    add("--picture", type=Path, metavar="FILE", help="also draw a picture, such as ml-100k.png")
    add = _command(of_data, "passport", do.data_passport, "print the identity of a split", texts.PASSPORT, texts.PASSPORT_KEYS)
    add("--dataset", "-d", required=True, help=_DATASET)
    add("--config_files", **_FILES)
    add = _command(of_data, "export", do.data_export, "write a split for other frameworks", texts.HANDOVER, texts.HANDOVER_KEYS)
    add("--dataset", "-d", required=True, help=_DATASET)
    add("--config_files", **_FILES)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the files, which must not exist")


def _of_installation(commands: _Group) -> None:
    """``doctor`` and the commands of ``cache``."""
    add = _command(commands, "doctor", do.doctor, "check the installation", texts.DOCTOR, texts.DOCTOR_KEYS)
    add("--checkpoint_dir", **_CHECKPOINT_DIR)

    cache = commands.add_parser("cache", help="list or clean saved results", description=texts.CACHE, epilog=texts.END, **_FORM)
    of_cache = cache.add_subparsers(title="commands (see recbole-llm cache COMMAND --help)", metavar="COMMAND", required=True)
    add = _command(of_cache, "list", do.cache_list, "show what lies under saved/", texts.CACHE_LIST, texts.CACHE_LIST_KEYS)
    add("--checkpoint_dir", **_CHECKPOINT_DIR)
    add = _command(of_cache, "clean", do.cache_clean, "remove what killed runs left", texts.CACHE_CLEAN, texts.CACHE_CLEAN_KEYS)
    add("--checkpoint_dir", **_CHECKPOINT_DIR)
    add("--unused", **_SWITCH, help="also remove stages that no run record names")
