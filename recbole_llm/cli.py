"""The command line, ``recbole-llm run | leaderboard | tune | merge | views``; without a command it is ``run``.

Arguments are read and checked before anything heavy is imported. What a user can mend ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from recbole_llm import __version__, compat, registry
from recbole_llm.merging.folders import METHODS, READERS, merge_folders

_ABOUT = """Published LLM recommenders as ordinary RecBole models.

Arguments are --key=value, with numbers, lists and dicts as in Python, --topk="[1, 5]", and paths separated by blanks,
--config_files="a.yaml b.yaml". The options of a command may also be written --key value. run, leaderboard, tune and views also
take every key of RecBole and of properties/*.yaml; these win over property files, and a later file wins over an earlier one."""

_END = """
exit code: 0; 1 if runs of a leaderboard failed; 2 after an error, which is one line. RECBOLE_LLM_TRACEBACK=1 shows its traceback.
"""

_RUN = """
Train and evaluate one model, an LLM recommender or any model of RecBole, on one dataset. Every model is evaluated on the same
candidates. Stages that an earlier run has trained are reused; a run that was killed resumes. The results are shown in a table and
written to saved/runs/<run>/record.json. python run_recbole_llm.py is the same command."""

_DATA = "  --data_path=DIR              folder that holds <dataset>/<dataset>.inter and .item (ml-100k comes with RecBole)\n"
_SAVED = "  --checkpoint_dir=saved       folder of stages, candidates and run records\n"
_RUN_KEYS = f"""
keys, with their defaults; properties/*.yaml and RecBole's documentation describe all of them:
{_DATA}{_SAVED}"""
_RUN_KEYS += """\
  --seed=2020                  of every random draw but that of the candidates; --gpu_id=0, --show_progress=True
  --epochs=300                 of a classical model; --train_batch_size=2048, --learning_rate=0.001
  --eval_args="{'mode': 'candidates'}"  {'mode': 'full'} is RecBole's full ranking (classical models, Laser)
  --candidates="{'source': 'uniform', 'num_negatives': 19, 'seed': 2020}"
  --metrics="['Hit', 'NDCG', 'MRR']"    --topk="[1, 5, 10]", --valid_metric=NDCG@10
  --eval_users=null            number of evaluation users; null takes all
  --llm=null                   a backbone of properties/llm (null: builtin); --llm_path=FOLDER_OR_HUB_ID for any other
  --general_datasets=[]        domains of the base-spirit LoRA, such as "['amazon-toys']"; --source_datasets=[] (WeaveRec)
  --merge=entropy              how LoRACocktail merges adapters; docs/merging.md lists the methods
  --init_from=null             folder of a run whose model this run initialises from (Laser)
  --new_items=null             scenarios for any model; also --cold_users, --train_users, --train_dataset

examples:
  recbole-llm run --model=LoRACocktail --dataset=ml-100k
  recbole-llm run --model=SASRec --dataset=ml-1m --data_path=DIR --eval_args="{'mode': 'full'}"
"""

_LEADERBOARD = """
Run the models, seeds and protocols that a property file lists (docs/leaderboard.md) and write one table with paired tests, as
JSON, Markdown, CSV, LaTeX and HTML. A run whose record exists is not repeated. Failed runs are reported and do not stop the
others. The table is printed to standard output, the log to standard error."""

_LEADERBOARD_KEYS = f"""
keys of every run, which win over the file's:
{_DATA}{_SAVED}
examples:
  recbole-llm leaderboard --config_files=properties/leaderboard/ml-100k.yaml --jobs=2
  recbole-llm leaderboard --config_files=mine.yaml --data_path=DIR --show
"""

_TUNE = """
Search hyper-parameters of one model on one dataset by the validation score, and write the best settings as a property file for
--config_files. Each evaluation is an ordinary run; a run whose record exists is not repeated. Needs Optuna:
pip install optuna."""

_TUNE_KEYS = f"""
a line of the search file is RecBole's, `key kind values`:
  learning_rate loguniform -8, -5         natural logarithms of the bounds
  hidden_dropout_prob choice [0.2, 0.5]   also: uniform LOW, HIGH and quniform LOW, HIGH, STEP

keys of every run, with their defaults:
{_DATA}{_SAVED}  --seed=2020                  of the search, and of its runs unless --seeds is given
  --valid_metric=NDCG@10       what is maximised

examples:
  recbole-llm tune --model=SASRec --dataset=ml-100k --params_file=properties/search/SASRec.hyper
  recbole-llm tune --model=BPR --dataset=ml-100k --params_file=properties/search/BPR.hyper --algo=random --max_evals=8 --epochs=40
"""

_MERGE = """
Merge LoRA adapters of one base model into one ordinary PEFT folder with a record of its sources. The methods entropy and grid
choose weights by prompts: run a model with --merge=entropy instead. See docs/merging.md."""

_MERGE_KEYS = """
examples:
  recbole-llm merge --adapters="base=runs/a/lora own=runs/b/lora" --merge=ties --density=0.3 --out=merged
  recbole-llm merge --adapters="lora_a lora_b" --merge=fixed --weights="[0.3, 0.7]" --out=merged
"""

_VIEWS = """
Cut a dataset by its categories into datasets of their own, <dataset>-<category>, on which any model runs. No item is in two of
them. Do not train on the whole dataset what is tested on a view: it contains the view's test items."""

_VIEWS_KEYS = f"""
keys, with their defaults:
{_DATA}  --domain_field=null          column of the categories; null takes category_field
  --domain_min_users=100       users with two items or more that a view needs
  --domain_max_views=2         number of views, the largest categories first

examples:
  recbole-llm views --dataset=ml-100k --domain_max_views=3
  recbole-llm views --dataset=mydata --data_path=DIR --category_field=genre --out=views
"""


# --show alone is --show=True
_SWITCH: dict[str, Any] = {"nargs": "?", "const": "True", "default": "False", "choices": ("True", "False")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        _fail(f"{message}; see {self.prog} --help")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, run the command, and end the process where it did not succeed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help", "--version"):
        given.insert(0, "run")
    options, others = _parser().parse_known_args(given)
    sys.path.append(os.getcwd())  # where models and merging methods of the user's own may be
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow other processes, up to ten-fold on few cores
    try:
        failed = options.function(options, _keys(others))
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        if os.environ.get("RECBOLE_LLM_TRACEBACK"):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        sys.exit(1)


def _run(options: argparse.Namespace, keys: list[str]) -> None:
    if options.model:
        registry.check_name(options.model)
    elif not options.config_files:
        raise ValueError("--model is missing: give it on the command line or in a property file")
    from recbole_llm.quick_start import run_recbole_llm

    run_recbole_llm(options.model, options.dataset, options.config_files or None, cmd_line=keys)


def _leaderboard(options: argparse.Namespace, keys: list[str]) -> bool:
    from recbole_llm import logs
    from recbole_llm.config.values import read_arguments
    from recbole_llm.leaderboard.board import make_leaderboard
    from recbole_llm.leaderboard.formats import to_markdown

    logs.init_console()
    own = {"jobs": options.jobs, "engine": options.engine, "out": options.out, "show": options.show == "True"}
    leaderboard, files = make_leaderboard(options.config_files, read_arguments(keys), **own)
    print(to_markdown(leaderboard), *files, sep="\n")
    return bool(leaderboard.failed)


def _tune(options: argparse.Namespace, keys: list[str]) -> None:
    registry.check_name(options.model)
    from recbole_llm import logs
    from recbole_llm.leaderboard.tuning import tune

    logs.init_console()
    own = ("config_files", "params_file", "algo", "max_evals", "seeds", "output_file")
    found = tune(options.model, options.dataset, arguments=keys, **{name: getattr(options, name) for name in own})
    print(found.table(), found.file, sep="\n")


def _merge(options: argparse.Namespace, keys: list[str]) -> None:
    if keys:
        raise ValueError(f"no option {keys[0].partition('=')[0]}; see recbole-llm merge --help")
    given = {name: getattr(options, name) for name in ("merge", "compress_rank", *READERS)}
    print(merge_folders(options.adapters, options.out, extrapolate=options.extrapolate == "True", **given))


def _views(options: argparse.Namespace, keys: list[str]) -> None:
    from recbole_llm import logs
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.loading import create_dataset
    from recbole_llm.data.views import write_views

    logs.init_console()
    config = LLMConfig("WeaveRec", options.dataset, options.config_files, cmd_line=keys)  # whose keys name the views
    print(*write_views(config, create_dataset(config), options.out), sep="\n")


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="recbole-llm", description=_ABOUT, epilog=_END, **form)
    parser.add_argument("--version", action="version", version=f"recbole-llm {__version__}")
    commands = parser.add_subparsers(title="commands (see recbole-llm COMMAND --help)", metavar="COMMAND", required=True)

    def command(name: str, function: Callable, line: str, about: str, keys: str) -> Callable[..., Any]:
        own = commands.add_parser(name, help=line, description=about, epilog=keys + _END, **form)
        own.set_defaults(function=function)
        return own.add_argument

    add = command("run", _run, "train and evaluate one model on one dataset", _RUN, _RUN_KEYS)
    add("--model", "-m", help=f"{', '.join(registry.MODELS)}, a model of RecBole such as SASRec, or your own, file:Class")
    add("--dataset", "-d", help="ml-100k comes with RecBole; others are read from --data_path")
    add("--config_files", type=_files, default=[], metavar="FILES", help="property files, separated by blanks")

    add = command("leaderboard", _leaderboard, "many models in one table", _LEADERBOARD, _LEADERBOARD_KEYS)
    add("--config_files", type=_file, required=True, metavar="FILE", help="such as properties/leaderboard/ml-100k.yaml")
    add("--jobs", type=int, default=1, help="runs at a time; they divide the cores (1)")
    add("--engine", default="process", choices=("process", "local", "slurm"), help="through submitit: local, slurm (process)")
    add("--out", type=Path, metavar="DIR", help="folder of the leaderboard (<checkpoint_dir>/leaderboard/<file>)")
    add("--show", **_SWITCH, help="run nothing, show what has run (False)")

    add = command("tune", _tune, "search hyper-parameters by the validation score", _TUNE, _TUNE_KEYS)
    add("--model", "-m", required=True, help="any model of recbole-llm run")
    add("--dataset", "-d", required=True, help="as for recbole-llm run")
    add("--params_file", type=_file, required=True, metavar="FILE", help="such as properties/search/SASRec.hyper")
    add("--config_files", type=_files, default=[], metavar="FILES", help="property files, separated by blanks")
    add("--algo", default="exhaustive", choices=("exhaustive", "random", "bayes"), help="(exhaustive: every combination)")
    add("--max_evals", type=int, metavar="N", help="settings that random and bayes evaluate (10)")
    add("--seeds", type=_list_of(int), metavar="LIST", help='"[2020, 2021]": the mean of these seeds decides (--seed)')
    add("--output_file", type=Path, metavar="FILE", help="(<checkpoint_dir>/tuning/<dataset>/<Model>.yaml)")

    add = command("merge", _merge, "merge LoRA adapters into one", _MERGE, _MERGE_KEYS)
    add("--adapters", type=shlex.split, required=True, metavar="FOLDERS", help='"[NAME=]FOLDER [NAME=]FOLDER ..."')
    add("--out", type=Path, required=True, metavar="DIR", help="the merged adapter; it must not exist yet")
    add("--merge", default="uniform", metavar="METHOD", help=f"{', '.join(METHODS)}, or package.module:function (uniform)")
    add("--weights", type=_list_of(int, float), metavar="LIST", help=f"one for each adapter ({', '.join(READERS['weights'])})")
    add("--density", type=float, metavar="D", help=f"share of entries that is kept, 0.5 ({', '.join(READERS['density'])})")
    add("--residual", type=float, metavar="L", help="share of the orthogonal parts, 0.1 (orthogonal_residual)")
    add("--seed", type=int, metavar="N", help="of the draw, 0 (dare, dare_ties)")
    add("--compress_rank", type=int, metavar="R", help="reduce the result to this rank by an SVD (keep it exact)")
    add("--extrapolate", **_SWITCH, help="allow weights outside [0, 1] (False)")

    add = command("views", _views, "cut a dataset by its categories into datasets", _VIEWS, _VIEWS_KEYS)
    add("--dataset", "-d", required=True, help="ml-100k comes with RecBole; others are read from --data_path")
    add("--config_files", type=_files, default=[], metavar="FILES", help="property files, separated by blanks")
    add("--out", type=Path, default=Path("views"), metavar="DIR", help="folder of the new datasets (views)")
    return parser


def _keys(given: Sequence[str]) -> list[str]:
    """The rest of a command line, which LLMConfig reads, checked as far as that needs no import."""
    for argument in given:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"command line: {argument!r} is not of the form --key=value")
        compat.refuse_options({key: text})
    return list(given)


def _file(text: str) -> Path:
    """A file; one of properties/ may also be the package's own."""
    package = Path(__file__).parent
    if not any((folder / text).is_file() for folder in (Path(), package, package.parent)):
        raise argparse.ArgumentTypeError(f"{text} does not exist (read from {Path.cwd()})")
    return Path(text)


def _files(text: str) -> list[str]:
    return [str(_file(name)) for name in text.split()]


def _list_of(*kinds: type) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        values = None
        with contextlib.suppress(ValueError, SyntaxError):
            values = ast.literal_eval(text)
        if not isinstance(values, list) or not values or not all(type(value) in kinds for value in values):
            example = "numbers, such as [0.3, 0.7]" if float in kinds else "whole numbers, such as [2020, 2021]"
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {example}")
        return values

    return read


if __name__ == "__main__":
    main()
