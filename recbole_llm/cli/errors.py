"""What an error says to a user of the command line."""

from __future__ import annotations

import contextlib
import errno
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from typing import NoReturn

from recbole_llm import compat

_KEPT = "finished stages and runs are kept, and the same command resumes from there"
_ELSEWHERE = "or give another --checkpoint_dir, or start in another folder, which log/ is written to"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space ({_KEPT}), {_ELSEWHERE}"),
    errno.EFBIG: f"the file would be larger than the disk or `ulimit -f` allows; raise the limit ({_KEPT}), {_ELSEWHERE}",
    errno.EIO: f"the disk may be full or damaged; see to it ({_KEPT}), {_ELSEWHERE}",
    errno.EROFS: f"the disk is read-only; make it writable ({_KEPT}), {_ELSEWHERE}",
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"change its permissions, {_ELSEWHERE}"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be, or the other way round; move it away"),
    errno.EISDIR: "a folder is where a file should be; move it away",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open; raise the limit of `ulimit -n`"),
    errno.ELOOP: "a link leads back to itself; remove it",
    errno.ENAMETOOLONG: "give a shorter path",
}


@contextlib.contextmanager
def quiet_streams() -> Iterator[None]:
    """A log that cannot be written, such as on a full disk, is no error of its own, and no traceback on the terminal."""
    import logging

    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before


def no_reader() -> bool:
    """Whether nothing reads standard output any more, as after ``| head``; the rest of the output is then dropped in silence."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return True
    return False


def fail(message: str) -> NoReturn:
    """End the process with one line and exit code 2."""
    if tells():
        with contextlib.suppress(OSError):  # the terminal may be a file on the full disk
            print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def one_line(text: str, longest: int = 2000) -> str:
    """A text as one line; of a long one, such as a hostile value, the beginning and the end."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


def reason(error: Exception) -> str:
    """What an error says if it was raised for the user; otherwise its type, too, and where its traceback is kept."""
    if isinstance(error, OSError) and error.strerror and error.errno in _REMEDIES:
        where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{where}{': ' if where else ''}{error.strerror}; {_REMEDIES[error.errno]}"
    if isinstance(error, (OSError, ImportError)) or was_raised_here(error):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory; lower train_batch_size, eval_batch_size or the size of the model, or free some"
    from recbole_llm import logs  # which imports large libraries

    try:
        kept = f"log file: {logs.keep_traceback(error)}"
    except OSError as trouble:
        kept = f"no log file could be written ({trouble})"
    return (
        f"{type(error).__name__}: {error}; this is a bug in the package, or an input that it does not handle; {kept}; "
        "RECBOLE_LLM_TRACEBACK=1 shows the traceback"
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
