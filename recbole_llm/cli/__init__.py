"""The command line, ``recbole-llm COMMAND``; the default command is ``run``.

Arguments are parsed before large libraries are imported. A mistake of the user ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from recbole_llm import compat
from recbole_llm.cli import commands
from recbole_llm.cli.errors import fail, no_reader, of_process, quiet_streams, reason, tells
from recbole_llm.cli.options import parser


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

    Exit codes: 0; 1 if runs failed; 2 for an error; 130 after Ctrl-C, 141 if nothing reads the output, 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help", "--version"):
        given.insert(0, "run")
    options, others = parser().parse_known_args(given)
    sys.path.append(os.getcwd())  # for models and merging methods of the user
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook sets its own backend, which may not be installed here
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow other processes, up to ten-fold on few cores
    try:
        if options.function is not commands.doctor:  # which says what else is missing, too
            compat.check_recbole()
        _check_processes(options)
        keys = _keys(others)
        if keys and options.function in commands.WITHOUT_KEYS:
            raise ValueError(f"no option {keys[0].partition('=')[0]}; see {options.prog} --help")
        with _terminable(), quiet_streams():
            failed = options.function(options, keys)
            print(end="", flush=True)
    except KeyboardInterrupt as interruption:
        if tells():
            print("interrupted: finished stages and runs are kept, and the same command reuses them", file=sys.stderr)
        sys.exit(143 if isinstance(interruption, _Terminated) else 130)
    except Exception as error:
        if os.environ.get("RECBOLE_LLM_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and no_reader():
            sys.exit(141)
        fail(of_process(reason(error)))
    if failed:
        sys.exit(1)


def _check_processes(options: argparse.Namespace) -> None:
    _, size = compat.launched()
    if size > 1 and options.function is not commands.run:
        raise ValueError(
            f"{size} processes were started, but only recbole-llm run is for several; start this command without a launcher"
        )


def _keys(given: Sequence[str]) -> list[str]:
    """The arguments for LLMConfig, with the checks that need no imports."""
    for argument in given:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"command line: {argument!r} is not of the form --key=value")
        compat.refuse_options({key: text}, "the command line")
    return list(given)
