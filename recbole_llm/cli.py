"""The command line, ``recbole-llm COMMAND``; the default command is ``run``.

Arguments are parsed before large libraries are imported. A mistake of the user ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from recbole_llm import __version__, compat, registry
from recbole_llm import cli_texts as texts
from recbole_llm.cli_errors import of_process, one_line, quiet_streams, reason, tells
from recbole_llm.cli_values import columns, list_of, paths
from recbole_llm.merging.folders import METHODS, READERS, merge_folders

# --show is the same as --show=True
_SWITCH: dict[str, Any] = {"nargs": "?", "const": "True", "default": "False", "choices": ("True", "False")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        _fail(f"{message}; see {self.prog} --help")


def _fail(message: str) -> NoReturn:
    if tells():
        with contextlib.suppress(OSError):  # the terminal may be a file on the full disk
            print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


class _Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM), as batch systems do at the end of their time; it ends as by Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise :class:`_Terminated` on SIGTERM within the block, so that temporary files are removed and child processes end."""
    if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
        yield
        return

    def end(*_: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command; a failure ends the process.

    Exit codes: 0; 1 if runs failed; 2 for an error; 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help", "--version"):
        given.insert(0, "run")
    options, others = _parser().parse_known_args(given)
    sys.path.append(os.getcwd())  # for models and merging methods of the user
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["MPLBACKEND"] = (
        "agg"  # pictures are files; in a notebook, this is its own backend, which may not be installed here
    )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow other processes, up to ten-fold on few cores
    try:
        _check_processes(options)
        with _terminable(), quiet_streams():
            failed = options.function(options, _keys(others))
    except KeyboardInterrupt as interruption:
        if tells():
            print("interrupted: finished stages and runs are kept, and the same command reuses them", file=sys.stderr)
        sys.exit(143 if isinstance(interruption, _Terminated) else 130)
    except Exception as error:
        if os.environ.get("RECBOLE_LLM_TRACEBACK"):
            raise
        _fail(of_process(reason(error)))
    if failed:
        sys.exit(1)


def _check_processes(options: argparse.Namespace) -> None:
    _, size = compat.launched()
    if size > 1 and options.function is not _run:
        raise ValueError(
            f"{size} processes were started, but only recbole-llm run is for several; start this command without a launcher"
        )


def _run(options: argparse.Namespace, keys: list[str]) -> None:
    _check_model(options)
    from recbole_llm.quick_start import run_recbole_llm

    run_recbole_llm(options.model, options.dataset, options.config_files or None, cmd_line=keys)


def _plan(options: argparse.Namespace, keys: list[str]) -> None:
    _check_model(options)
    from recbole_llm.quick_start import plan_run

    print(plan_run(options.model, options.dataset, options.config_files or None, cmd_line=keys, device=options.device))


def _check_model(options: argparse.Namespace) -> None:
    if options.model:
        registry.check_name(options.model)
    elif not options.config_files:
        raise ValueError("--model is missing: give it on the command line or in a property file")


def _leaderboard(options: argparse.Namespace, keys: list[str]) -> bool:
    from recbole_llm import logs
    from recbole_llm.config.values import read_arguments
    from recbole_llm.leaderboard.board import make_leaderboard
    from recbole_llm.leaderboard.formats import to_markdown

    logs.init_console()
    own = {"jobs": options.jobs, "engine": options.engine, "out": options.out, "show": options.show == "True"}
    if options.look is not None:
        from recbole_llm.look.boards import pages_of

        own["beside"] = pages_of(options.look)
    leaderboard, files = make_leaderboard(options.config_files, read_arguments(keys), **own)
    print(to_markdown(leaderboard), *files, sep="\n")
    return bool(leaderboard.failed)


def _replicate(options: argparse.Namespace, keys: list[str]) -> bool:
    from recbole_llm import logs
    from recbole_llm.config.values import read_arguments
    from recbole_llm.replication.replicate import replicate

    logs.init_console()
    own = {"jobs": options.jobs, "engine": options.engine, "out": options.out, "show": options.show == "True"}
    files, missing = replicate(options.names, read_arguments(keys), **own)
    print(*files, sep="\n")
    return bool(missing)


def _recommend(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "recommend")
    given = [name for name in ("user", "users", "history") if getattr(options, name) is not None]
    if len(given) != 1:
        raise ValueError("give one of --user=ID, --history='TITLE|TITLE' and --users=FILE")
    if options.history is not None and not options.history.strip("| "):
        raise ValueError("--history is empty; give titles or ids, --history='TITLE|TITLE'")
    from recbole_llm import logs
    from recbole_llm.recommend import output
    from recbole_llm.recommend.recommender import load

    if options.top < 1:
        raise ValueError(f"--top={options.top}: give a number of items, 1 or more")
    if options.out is not None:
        output.check_ending(options.out)
    users = output.read_lines(options.users, "--users") if options.users else [options.user]
    candidates = output.read_lines(options.candidates, "--candidates") if options.candidates else None
    logs.init_console(warnings_alone=True)
    where = {name: getattr(options, name) for name in ("data_path", "model", "llm_path", "text_encoder_path")}
    recommender = load(options.run, **where, retriever=candidates is None)
    number = len(users)
    if options.history is not None:
        titles = recommender.titles
        asked = iter([("your history", 0, titles.find_all(titles.split(options.history), "--history"))])
    else:
        asked = recommender.people(users, options.until)
    own = {"k": options.top, "candidates": candidates, "until": options.until, "row": options.row, "index": options.index}
    own["seen"] = options.seen == "True"
    if options.index != "exact" and candidates is None:
        print(recommender.index(options.index, options.row))
    if options.out is None:
        print(*output.show(recommender, asked, **own), sep="\n\n")
    else:
        lines = output.write(recommender, asked, options.out, number=number, show_progress=True, **own)
        print(f"{options.out}: {lines:,} lines for {number:,} users")


def _look(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "look")
    from recbole_llm import logs
    from recbole_llm.look.page import write_look
    from recbole_llm.recommend.output import read_lines

    users = int(options.users) if options.users.isdecimal() else read_lines(Path(options.users), "--users")
    logs.init_console(warnings_alone=True)
    runs = [run for text in options.runs for run in paths(text)]
    own = {"rows": options.rows, "users": users, "top": options.top, "data_path": options.data_path, "show_progress": True}
    content = write_look(runs, options.out, **own)
    print(f"{options.out}: {len(content['users']):,} users; {'; '.join(one['name'] for one in content['columns'])}")


def _share(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "share")
    from recbole_llm import logs
    from recbole_llm.share.sharing import share

    logs.init_console(warnings_alone=True)
    switches = {"user_ids": options.user_ids == "True", "private": options.private == "True"}
    print(*share(options.run, options.to, licence=options.license, **switches), sep="\n")


def _tune(options: argparse.Namespace, keys: list[str]) -> None:
    registry.check_name(options.model)
    from recbole_llm import logs
    from recbole_llm.leaderboard.tuning import tune

    logs.init_console()
    own = ("config_files", "params_file", "algo", "max_evals", "seeds", "output_file")
    found = tune(options.model, options.dataset, arguments=keys, **{name: getattr(options, name) for name in own})
    print(found.table(), found.file, sep="\n")


def _merge(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "merge")
    if options.full_model is not None:
        from recbole_llm import logs

        logs.init_console()  # warnings of libraries that load the base model
    given = {name: getattr(options, name) for name in ("merge", "compress_rank", "full_model", "base_model", *READERS)}
    print(merge_folders(options.adapters, options.out, extrapolate=options.extrapolate == "True", **given))


def _forecast(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "forecast")
    from recbole_llm.leaderboard.forecast import write_forecast

    found, files = write_forecast(options.runs, options.out, metric=options.metric)
    print(found, *files, sep="\n")


def _export(options: argparse.Namespace, keys: list[str]) -> None:
    registry.check_name(options.model)
    from recbole_llm import logs
    from recbole_llm.config import LLMConfig
    from recbole_llm.export import export

    config = LLMConfig(options.model, options.dataset, options.config_files, cmd_line=keys)
    logs.init_console()
    print(*export(config, options.out, layout=options.layout, passes=options.passes, ids=options.ids == "True"), sep="\n")


def _views(options: argparse.Namespace, keys: list[str]) -> None:
    from recbole_llm import logs
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.loading import create_dataset
    from recbole_llm.data.views import write_views

    logs.init_console()
    config = LLMConfig("WeaveRec", options.dataset, options.config_files, cmd_line=keys)  # the model with the keys of views
    print(*write_views(config, create_dataset(config), options.out), sep="\n")


def _data_passport(options: argparse.Namespace, keys: list[str]) -> None:
    from recbole_llm import logs
    from recbole_llm.config import LLMConfig
    from recbole_llm.evaluation.known_splits import describe, write_passport

    logs.init_console()
    config = LLMConfig("Pop", options.dataset, options.config_files, cmd_line=keys)  # the split does not depend on the model
    passport, file = write_passport(config)
    print(describe(passport), file, sep="\n")


def _data_export(options: argparse.Namespace, keys: list[str]) -> None:
    from recbole_llm import logs
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.handover import write_split
    from recbole_llm.data.loading import create_dataset

    logs.init_console()
    # the split does not depend on the model, nor on the scale of the times, which are written as they are
    config = LLMConfig("Pop", options.dataset, options.config_files, {"normalize_all": False}, cmd_line=keys)
    print(*write_split(config, create_dataset(config), options.out), sep="\n")


def _data_convert(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "data convert")
    from recbole_llm.convert.conversion import Conversion, Options

    names = ("to", "out", "items", "columns", "item_columns", "time_format", "encoding", "k_core", "min_rating", "repeats")
    own = {name: getattr(options, name) for name in names}
    conversion = Conversion(options.source, Options(**own, description=options.description == "True"))
    print(*conversion.plan(), sep="\n", flush=True)
    if options.show != "True":
        print("", *conversion.run(), sep="\n")


def _data_describe(options: argparse.Namespace, keys: list[str]) -> None:
    from recbole_llm import logs
    from recbole_llm.describe.facts import describe
    from recbole_llm.describe.picture import check_ending, draw
    from recbole_llm.describe.words import in_words

    if options.picture is not None:
        check_ending(options.picture)
    logs.init_console(warnings_alone=True)
    found = describe(options.dataset, options.config_files or None, keys)
    print(in_words(found))
    if options.picture is not None:
        draw(found, options.picture)
        print("", options.picture, sep="\n")


def _doctor(options: argparse.Namespace, keys: list[str]) -> bool:
    _check_no_keys(keys, "doctor")
    from recbole_llm.doctor.report import examine

    report = examine(options.checkpoint_dir)
    print(report)
    return not report.healthy


def _cache_list(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "cache list")
    from recbole_llm.store.leftovers import contents

    print(contents(options.checkpoint_dir))


def _cache_clean(options: argparse.Namespace, keys: list[str]) -> None:
    _check_no_keys(keys, "cache clean")
    from recbole_llm.store.leftovers import clean

    lines = 0
    for lines, line in enumerate(clean(options.checkpoint_dir, with_unused=options.unused == "True"), start=1):  # noqa: B007
        print(line)
    if not lines:
        print(f"nothing is left over in {options.checkpoint_dir}")


def _check_no_keys(keys: Sequence[str], command: str) -> None:
    if keys:
        raise ValueError(f"no option {keys[0].partition('=')[0]}; see recbole-llm {command} --help")


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="recbole-llm", description=texts.ABOUT, epilog=texts.END, **form)
    parser.add_argument("--version", action="version", version=f"recbole-llm {__version__}")
    commands = parser.add_subparsers(title="commands (see recbole-llm COMMAND --help)", metavar="COMMAND", required=True)

    def command(name: str, function: Callable, line: str, about: str, keys: str, group: Any = commands) -> Callable[..., Any]:
        own = group.add_parser(name, help=line, description=about, epilog=keys + texts.END, **form)
        own.set_defaults(function=function)
        return own.add_argument

    def several(add: Callable[..., Any]) -> None:
        """The options of commands that start several runs."""
        add("--jobs", type=int, default=1, help="number of parallel runs, which share the cores (default: 1)")
        engines = ("process", "local", "slurm")
        add("--engine", default="process", choices=engines, help="local, slurm: submitit (default: process)")
        add("--show", **_SWITCH, help="run nothing and show the existing records")

    dataset = "ml-100k, which comes with RecBole, or a dataset in --data_path"
    files: dict[str, Any] = {"type": str.split, "default": [], "metavar": "FILES", "help": "property files, separated by spaces"}

    add = command("run", _run, "train and evaluate one model on one dataset", texts.RUN, texts.RUN_KEYS)
    add("--model", "-m", help=f"{', '.join(registry.MODELS)}, a model of RecBole such as SASRec, or your own, file:Class")
    add("--dataset", "-d", help=dataset)
    add("--config_files", **files)

    add = command("plan", _plan, "show what a run costs before it is started", texts.PLAN, texts.PLAN_KEYS)
    add("--model", "-m", help="a model, as for recbole-llm run")
    add("--dataset", "-d", help=dataset)
    add("--config_files", **files)
    add("--device", metavar="CARD", help="predict the time on this card, such as h100, a100, 4090 (default: this machine)")

    add = command("leaderboard", _leaderboard, "compare many models in one table", texts.LEADERBOARD, texts.LEADERBOARD_KEYS)
    add("--config_files", type=Path, required=True, metavar="FILE", help="such as properties/leaderboard/ml-100k.yaml")
    several(add)
    add("--out", type=Path, metavar="DIR", help="output folder (default: <checkpoint_dir>/leaderboard/<file>)")
    add("--look", nargs="?", type=int, const=5, metavar="N", help="also a page of what the best N rows recommend (5)")

    add = command("replicate", _replicate, "test the claims of papers", texts.REPLICATE, texts.REPLICATE_KEYS)
    add("names", nargs="*", metavar="NAME", help="files of properties/claims without .yaml, or a file of yours (default: all)")
    several(add)
    add(
        "--out",
        type=Path,
        default=Path("docs"),
        metavar="DIR",
        help="folder of replication.json and replication.md (default: docs)",
    )

    add = command("recommend", _recommend, "what a run recommends to a user", texts.RECOMMEND, texts.RECOMMEND_KEYS)
    a_run = "folder of a run, such as saved/runs/SASRec-ml-100k-1234abcd"
    add("--run", required=True, metavar="RUN", help=f"{a_run}, a shared folder, or hub:user/name")
    add("--user", metavar="ID", help="a user of the dataset")
    add("--history", metavar="TEXT", help='titles or ids of items, oldest first, "TITLE|TITLE|TITLE", of anybody')
    add("--users", type=Path, metavar="FILE", help="users of the dataset, one id per line")
    add("--top", type=int, default=10, metavar="K", help="number of items for each (default: 10)")
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

    add = command("look", _look, "a page of what runs recommend, side by side", texts.LOOK, texts.LOOK_KEYS)
    add("--runs", nargs="+", required=True, metavar="RUN", help="folders of runs, or NAME=RUN for another name than the model's")
    add("--rows", nargs="+", default=[], metavar="ROW", help='also show these rows of the runs, such as "no adapter"')
    add("--out", type=Path, default=Path("look.html"), metavar="FILE", help="default: look.html")
    add("--users", default="200", metavar="N", help="number of users, or a file of user ids, one per line (default: 200)")
    add("--top", type=int, default=10, metavar="K", help="number of items in a list (default: 10)")
    add("--data_path", metavar="DIR", help="folder that contains the dataset, if it has moved")

    add = command("share", _share, "give a run to others, as a folder or on the hub", texts.SHARE, texts.SHARE_KEYS)
    add("run", metavar="RUN", help=a_run)
    add("--to", required=True, metavar="WHERE", help="a folder that does not exist, or hub:user/name")
    add("--user_ids", **_SWITCH, help="keep the ids of users with their ranks")
    add("--license", metavar="ID", help="of what is shared, such as mit or apache-2.0 (default: that of the base model)")
    add("--private", **_SWITCH, help="a new repository of the hub that nobody else sees")

    add = command("tune", _tune, "search hyper-parameters by the validation score", texts.TUNE, texts.TUNE_KEYS)
    add("--model", "-m", required=True, help="a model, as for recbole-llm run")
    add("--dataset", "-d", required=True, help=dataset)
    add("--params_file", type=Path, required=True, metavar="FILE", help="search space, such as properties/search/SASRec.hyper")
    add("--config_files", **files)
    add("--algo", default="exhaustive", choices=("exhaustive", "random", "bayes"), help="default: exhaustive, all combinations")
    add("--max_evals", type=int, metavar="N", help="number of settings for random and bayes (default: 10)")
    add("--seeds", type=list_of(int), metavar="LIST", help='score by the mean over seeds, "[2020, 2021]" (default: --seed)')
    add("--output_file", type=Path, metavar="FILE", help="default: <checkpoint_dir>/tuning/<dataset>/<Model>.yaml")

    add = command("merge", _merge, "merge LoRA adapters into one", texts.MERGE, texts.MERGE_KEYS)
    add("--adapters", type=shlex.split, required=True, metavar="FOLDERS", help='"[NAME=]FOLDER [NAME=]FOLDER ..."')
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the merged adapter, which must not exist")
    add("--merge", default="uniform", metavar="METHOD", help=f"{', '.join(METHODS)}, package.module:function (default: uniform)")
    add("--weights", type=list_of(int, float), metavar="LIST", help=f"one for each adapter; for {', '.join(READERS['weights'])}")
    add("--density", type=float, metavar="D", help=f"share of entries to keep, default 0.5; for {', '.join(READERS['density'])}")
    add("--residual", type=float, metavar="L", help="weight of the orthogonal parts, default 0.1; for orthogonal_residual")
    add("--seed", type=int, metavar="N", help="random seed, default 0; for dare, dare_ties")
    add("--compress_rank", type=int, metavar="R", help="reduce the result to this rank by SVD (default: exact, no reduction)")
    add("--extrapolate", **_SWITCH, help="allow weights outside [0, 1]")
    add("--full_model", type=Path, metavar="DIR", help="also write the base model with the result folded into its weights")
    add("--base_model", metavar="PATH", help="its folder or hub id, if it is not the one that the adapters name")

    add = command("forecast", _forecast, "whether adapters foretell the gain of a merge", texts.FORECAST, texts.FORECAST_KEYS)
    add("runs", nargs="+", type=Path, metavar="RUN", help="records, folders of runs, or folders that contain them: saved/runs")
    add("--out", type=Path, default=Path("forecast"), metavar="DIR", help="output folder (default: forecast)")
    add("--metric", help="such as ndcg@10 (default: the first of the runs)")

    add = command("export", _export, "write a model's prompts as JSONL", texts.EXPORT, texts.EXPORT_KEYS)
    add("--model", "-m", required=True, help="a model that trains adapters: LoRACocktail, MoLoRec, WeaveRec, TALLRec, LlamaRec")
    add("--dataset", "-d", required=True, help=dataset)
    add("--config_files", **files)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the files, which must not exist")
    add("--layout", default="messages", choices=("messages", "alpaca"), help="form of a line (default: messages)")
    add("--passes", type=int, default=1, metavar="N", help="epochs to write; their negatives differ (default: 1)")
    add("--ids", **_SWITCH, help="also write the token ids of each line, as input_ids and labels")

    add = command("views", _views, "split a dataset by category into datasets", texts.VIEWS, texts.VIEWS_KEYS)
    add("--dataset", "-d", required=True, help=dataset)
    add("--config_files", **files)
    add("--out", type=Path, default=Path("views"), metavar="DIR", help="folder of the new datasets (default: views)")

    data = commands.add_parser(
        "data", help="make a dataset, describe its split", description=texts.SPLITS, epilog=texts.END, **form
    )
    of_data = data.add_subparsers(title="commands (see recbole-llm data COMMAND --help)", metavar="COMMAND", required=True)
    add = command("convert", _data_convert, "make a dataset of your files", texts.CONVERT, texts.CONVERT_KEYS, of_data)
    add("source", type=Path, metavar="SOURCE", help="a table of interactions, or a release: its folder, its .zip, its reviews")
    add("--to", required=True, metavar="NAME", help="name of the dataset")
    add("--out", type=Path, default=Path("dataset"), metavar="DIR", help="its parent folder, the data_path (default: dataset)")
    add("--items", type=Path, metavar="FILE", help="a table of items, if their titles are not in SOURCE")
    roles = "user, item, time, rating, title, year, brand, category, description"
    add("--columns", type=columns, default={}, metavar="DICT", help=f"columns of SOURCE by role: {roles}; None: no such column")
    add("--item_columns", type=columns, default={}, metavar="DICT", help="columns of --items: item and the last five of these")
    add("--time_format", metavar="FORMAT", help="of dates whose form is not clear, such as '%%d/%%m/%%Y %%H:%%M'")
    add("--encoding", default="utf-8", help="of tables of your own (default: utf-8)")
    add("--k_core", type=int, metavar="K", help="keep users and items with K different items and users (default: all)")
    add("--min_rating", type=float, metavar="R", help="keep ratings of at least R (default: all)")
    kinds = ("exact", "first", "last", "keep")
    add(
        "--repeats",
        default="exact",
        choices=kinds,
        help="of a user and an item: drop equal rows, keep one, or all (default: exact)",
    )
    add("--description", **_SWITCH, help="also write the descriptions of items")
    add("--show", **_SWITCH, help="show what is understood, and write nothing")
    add = command("describe", _data_describe, "what a dataset contains", texts.DESCRIBE, texts.DESCRIBE_KEYS, of_data)
    add("dataset", metavar="NAME", help=dataset)
    add("--config_files", **files)
    add("--picture", type=Path, metavar="FILE", help="also draw a picture, such as ml-100k.png")
    add = command("passport", _data_passport, "the identity of a split", texts.PASSPORT, texts.PASSPORT_KEYS, of_data)
    add("--dataset", "-d", required=True, help=dataset)
    add("--config_files", **files)
    add = command("export", _data_export, "write a split for other frameworks", texts.HANDOVER, texts.HANDOVER_KEYS, of_data)
    add("--dataset", "-d", required=True, help=dataset)
    add("--config_files", **files)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the files, which must not exist")

    root: dict[str, Any] = {"type": Path, "default": Path("saved"), "metavar": "DIR", "help": "default: saved"}
    add = command("doctor", _doctor, "what is wrong with the installation", texts.DOCTOR, texts.DOCTOR_KEYS)
    add("--checkpoint_dir", **root)

    cache = commands.add_parser("cache", help="list or clean saved results", description=texts.CACHE, epilog=texts.END, **form)
    of_cache = cache.add_subparsers(title="commands (see recbole-llm cache COMMAND --help)", metavar="COMMAND", required=True)
    add = command("list", _cache_list, "what lies under saved/", texts.CACHE_LIST, texts.CACHE_LIST_KEYS, of_cache)
    add("--checkpoint_dir", **root)
    add = command("clean", _cache_clean, "remove what killed runs left", texts.CACHE_CLEAN, texts.CACHE_CLEAN_KEYS, of_cache)
    add("--checkpoint_dir", **root)
    add("--unused", **_SWITCH, help="also remove stages that no run record names")
    return parser


def _keys(given: Sequence[str]) -> list[str]:
    """The arguments for LLMConfig, with the checks that need no imports."""
    for argument in given:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"command line: {argument!r} is not of the form --key=value")
        compat.refuse_options({key: text}, "the command line")
    return list(given)


if __name__ == "__main__":
    main()
