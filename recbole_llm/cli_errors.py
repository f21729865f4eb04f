"""What an error says to a user of the command line."""

from __future__ import annotations

import linecache
import sys
import sysconfig

from recbole_llm import compat


def reason(error: Exception) -> str:
    """What an error says if it was raised for the user; otherwise its type, too, and where its traceback is kept."""
    if isinstance(error, (OSError, ImportError)) or was_raised_here(error):
        return str(error)
    from recbole_llm import logs  # which imports large libraries

    return (
        f"{type(error).__name__}: {error}; this is a fault of the package, or of an input that it does not know; log file: "
        f"{logs.keep_traceback(error)}; RECBOLE_LLM_TRACEBACK=1 shows the traceback"
    )


def tells() -> bool:
    """Whether this process says why it ends: of several processes of a run, one does."""
    rank, size = compat.launched()
    if size == 1 or "torch" not in sys.modules:  # they have not joined yet, and fail alike
        return rank == 0
    from recbole_llm.store.processes import first_to_end

    return first_to_end()


def of_process(message: str) -> str:
    """A message with the number of this process, if it is not the first of several."""
    rank, size = compat.launched()
    return f"process {rank} of {size}: {message}" if rank else message


def was_raised_here(error: Exception) -> bool:
    """Whether a ``raise`` of this package, of RecBole or of a user's model made the error, and not an operation or a library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, (ValueError, NotImplementedError)):
        return False
    file, name = trace.tb_frame.f_code.co_filename, trace.tb_frame.f_globals.get("__name__", "")
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    ours = name.partition(".")[0] in ("recbole", "recbole_llm") or not file.startswith(libraries)
    return ours and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise")
