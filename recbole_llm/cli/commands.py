"""What each command does, as a function of its options and of the ``--key=value`` arguments; large libraries are imported within.

A function returns True if runs failed, claims have no result, or the doctor found a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

from recbole_llm import registry
from recbole_llm.cli.values import paths
from recbole_llm.merging.folders import READERS, merge_folders


@contextlib.contextmanager
def _large_imports() -> Iterator[None]:
    """Import large libraries without a search for garbage in what they leave, which stays until the process ends.

    They make hundreds of thousands of objects, through which Python would look during the imports, in the run and at its end.
    """
    if "torch" in sys.modules or not gc.isenabled():  # a caller's process, whose garbage would be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _console(*, warnings_alone: bool = False) -> None:
    """Log to standard error."""
    from recbole_llm import logs

    logs.init_console(warnings_alone=warnings_alone)


def run(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm run``."""
    _check_model(options)
    with _large_imports():
        from recbole_llm.quick_start import run_recbole_llm

    run_recbole_llm(options.model, options.dataset, options.config_files or None, cmd_line=keys)


def plan(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm plan``."""
    _check_model(options)
    with _large_imports():
        from recbole_llm.quick_start import plan_run

    print(plan_run(options.model, options.dataset, options.config_files or None, cmd_line=keys, device=options.device))


def _check_model(options: argparse.Namespace) -> None:
    if options.model:
        registry.check_name(options.model)
    elif not options.config_files:
        raise ValueError("--model is missing: give it on the command line or in a property file")


def leaderboard(options: argparse.Namespace, keys: list[str]) -> bool:
    """``recbole-llm leaderboard``."""
    with _large_imports():
        from recbole_llm.config.property_files import PropertyFiles
        from recbole_llm.leaderboard.board import make_leaderboard
        from recbole_llm.leaderboard.formats import to_markdown

    _console()
    own = {name: getattr(options, name) for name in ("jobs", "engine", "out", "page")} | {"show": options.show == "True"}
    if options.look is not None:
        from recbole_llm.look.boards import pages_of

        own["beside"] = pages_of(options.look)
    leaderboard, files = make_leaderboard(options.config_files, PropertyFiles().of_command_line(keys), **own)
    print(to_markdown(leaderboard), *files, sep="\n")
    return bool(leaderboard.failed)


def replicate(options: argparse.Namespace, keys: list[str]) -> bool:
    """``recbole-llm replicate``."""
    with _large_imports():
        from recbole_llm.config.property_files import PropertyFiles
        from recbole_llm.replication.replicate import replicate

    _console()
    own = {"jobs": options.jobs, "engine": options.engine, "out": options.out, "show": options.show == "True"}
    own["claims"] = options.claim
    files, missing = replicate(options.names, PropertyFiles().of_command_line(keys), **own)
    print(*files, sep="\n")
    return bool(missing)


def recommend(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm recommend``."""
    given = [name for name in ("user", "users", "history") if getattr(options, name) is not None]
    if len(given) != 1:
        raise ValueError("give one of --user=ID, --history='TITLE|TITLE' and --users=FILE")
    if options.history is not None and not options.history.strip("| "):
        raise ValueError("--history is empty; give titles or ids, --history='TITLE|TITLE'")
    with _large_imports():
        from recbole_llm.recommend import output
        from recbole_llm.recommend.recommender import load
        from recbole_llm.recommend.request import Person, Request

    if options.out is not None:
        output.check_ending(options.out)
    users = [*dict.fromkeys(output.read_lines(options.users, "--users"))] if options.users else [options.user]
    candidates = output.read_lines(options.candidates, "--candidates") if options.candidates else None
    request = Request(options.top, candidates, options.until, options.seen == "True", options.row, options.index)
    _console(warnings_alone=True)
    where = {name: getattr(options, name) for name in ("data_path", "model", "llm_path", "text_encoder_path")}
    recommender = load(options.run, **where, retriever=candidates is None)
    if options.history is not None:
        titles = recommender.titles
        people = iter([Person("your history", 0, titles.find_all(titles.split(options.history), "--history"))])
    else:
        people = recommender.people(users, options.until)
    if options.index != "exact" and candidates is None:
        print(recommender.index(options.index, options.row))
    if options.out is None:
        print(*output.show(recommender, people, request), sep="\n\n")
    else:
        number = len(users)
        lines = output.write(recommender, people, request, options.out, number=number, show_progress=True)
        print(f"{options.out}: {lines:,} lines for {number:,} users")


def evaluate(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm evaluate``."""
    with _large_imports():
        from recbole_llm.config.property_files import PropertyFiles
        from recbole_llm.recommend.reevaluate import evaluate_run

    _console()
    evaluate_run(options.run, PropertyFiles().of_command_line(keys), options.data_path, options.model)


def look(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm look``."""
    if options.out.suffix != ".html":
        raise ValueError(f"--out={options.out}: give the name of an .html file")
    with _large_imports():
        from recbole_llm.look.columns import read_columns
        from recbole_llm.look.content import page_content
        from recbole_llm.look.page import to_html
        from recbole_llm.recommend.output import read_lines
        from recbole_llm.store.files import atomic_write

    given = options.users
    users = int(given) if given.isdecimal() else [*dict.fromkeys(read_lines(Path(given), "--users"))]
    _console(warnings_alone=True)
    columns = read_columns([run for text in options.runs for run in paths(text)], options.rows)
    content = page_content(columns, users, top=options.top, data_path=options.data_path)
    atomic_write(options.out, to_html(content, columns))
    print(f"{options.out}: {len(content['users']):,} users; {'; '.join(one['name'] for one in content['columns'])}")


def share(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm share``."""
    with _large_imports():
        from recbole_llm.share.sharing import share

    _console(warnings_alone=True)
    switches = {"user_ids": options.user_ids == "True", "private": options.private == "True"}
    print(*share(options.run, options.to, licence=options.license, **switches), sep="\n")


def tune(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm tune``."""
    registry.check_name(options.model)
    with _large_imports():
        from recbole_llm.leaderboard.tuning import tune

    _console()
    own = ("config_files", "params_file", "algo", "max_evals", "seeds", "output_file")
    found = tune(options.model, options.dataset, arguments=keys, **{name: getattr(options, name) for name in own})
    print(found.table(), found.file, sep="\n")


def merge(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm merge``."""
    if options.full_model is not None:
        _console()  # warnings of libraries that load the base model
    given = {name: getattr(options, name) for name in ("merge", "compress_rank", "full_model", "base_model", *READERS)}
    print(merge_folders(options.adapters, options.out, extrapolate=options.extrapolate == "True", **given))


def forecast(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm forecast``."""
    from recbole_llm.leaderboard.forecast import write_forecast

    found, files = write_forecast(options.runs, options.out, metric=options.metric)
    print(found, *files, sep="\n")


def export(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm export``."""
    registry.check_name(options.model)
    from recbole_llm.config import LLMConfig
    from recbole_llm.export import export

    config = LLMConfig(options.model, options.dataset, options.config_files, cmd_line=keys)
    _console()
    print(*export(config, options.out, layout=options.layout, passes=options.passes, ids=options.ids == "True"), sep="\n")


def views(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm views``."""
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.loading import create_dataset
    from recbole_llm.data.views import write_views

    _console()
    config = LLMConfig("WeaveRec", options.dataset, options.config_files, cmd_line=keys)  # the model with the keys of views
    print(*write_views(config, create_dataset(config), options.out), sep="\n")


def data_passport(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm data passport``."""
    from recbole_llm.config import LLMConfig
    from recbole_llm.evaluation.known_splits import describe, write_passport

    _console()
    config = LLMConfig("Pop", options.dataset, options.config_files, cmd_line=keys)  # the split does not depend on the model
    passport, file = write_passport(config)
    print(describe(passport), file, sep="\n")


def data_export(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm data export``."""
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.handover import write_split
    from recbole_llm.data.loading import create_dataset

    _console()
    # the split does not depend on the model, nor on the scale of the times, which are written as they are
    config = LLMConfig("Pop", options.dataset, options.config_files, {"normalize_all": False}, cmd_line=keys)
    print(*write_split(config, create_dataset(config), options.out), sep="\n")


def data_convert(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm data convert``."""
    from recbole_llm.convert.conversion import Conversion, Options

    names = ("to", "out", "items", "columns", "item_columns", "time_format", "encoding", "k_core", "min_rating", "repeats")
    own = {name: getattr(options, name) for name in names}
    own |= {name: getattr(options, name) == "True" for name in ("description", "drop_incomplete")}
    conversion = Conversion(options.source, Options(**own))
    print(*conversion.plan(), sep="\n", flush=True)
    if options.show != "True":
        print("", *conversion.run(), sep="\n")


def data_describe(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm data describe``."""
    from recbole_llm.describe.facts import describe
    from recbole_llm.describe.picture import check_ending, draw
    from recbole_llm.describe.words import in_words

    if options.picture is not None:
        check_ending(options.picture)
    _console(warnings_alone=True)
    found = describe(options.dataset, options.config_files or None, keys)
    print(in_words(found))
    if options.picture is not None:
        draw(found, options.picture)
        print("", options.picture, sep="\n")


def doctor(options: argparse.Namespace, keys: list[str]) -> bool:
    """``recbole-llm doctor``."""
    from recbole_llm.doctor.report import examine

    report = examine(options.checkpoint_dir)
    print(report)
    return not report.healthy


def cache_list(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm cache list``."""
    from recbole_llm.store.leftovers import contents

    print(contents(options.checkpoint_dir))


def cache_clean(options: argparse.Namespace, keys: list[str]) -> None:
    """``recbole-llm cache clean``."""
    from recbole_llm.store.leftovers import clean

    lines = 0
    for lines, line in enumerate(clean(options.checkpoint_dir, with_unused=options.unused == "True"), start=1):  # noqa: B007
        print(line)
    if not lines:
        print(f"nothing is left over in {options.checkpoint_dir}")


WITHOUT_KEYS = (recommend, look, share, merge, forecast, data_convert, doctor, cache_list, cache_clean)
