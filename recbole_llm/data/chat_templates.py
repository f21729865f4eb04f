"""Chat templates, which are programs in a backbone's folder: bounded in time and memory, and the same text on every day.

A template of two lines can loop for years or fill the memory, in a single operation of Python that nothing in this process can
stop. So the first rendering of each form of messages is tried in a child process with limits of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS, BYTES = 5, 2**30
"""CPU time and memory that a rendering may take; those of published models take milliseconds and kilobytes."""
TODAY = datetime(2024, 7, 26)  # for templates that show the date, the one that Llama 3.1's shows
_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
_CLOCK = re.compile(r"\bstrftime_now\b(?!\s+is\s+(not\s+)?defined)")
_CHANCE = re.compile(r"\|\s*random\b|\bfilter\s+random\b|\blipsum\b|\bmap\(\s*['\"]random['\"]")
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")  # of an object without a text of its own, such as a generator
_tried: set[Any] = set()


class UnboundedTemplateError(ValueError):
    """A template that is not the same text in each run, or costs too much; the caller adds whose it is."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, dated: bool = True, **options: Any
) -> str:
    """The text of messages in the tokenizer's chat template.

    Args:
        dated: replace the clock by :data:`TODAY`.
        options: of ``apply_chat_template``.

    Raises:
        UnboundedTemplateError: the template reads the clock in another way than by a written format, draws at random, writes a
            place in memory, or takes more than :data:`SECONDS` or :data:`BYTES`.
    """
    template = str(tokenizer.get_chat_template())
    if dated:
        template = _NOW.sub(lambda found: repr(TODAY.strftime(found["format"])), template)
        if found := _CLOCK.search(template) or _CHANCE.search(template):
            raise UnboundedTemplateError(f"has {found[0].strip('| ')!r}, so its text would be another one in each run")

    def apply() -> str:
        drawn = random.getstate()
        random.seed(0)  # for a filter that is named while the template runs
        try:
            return str(tokenizer.apply_chat_template([*map(dict, messages)], chat_template=template, tokenize=False, **options))
        finally:
            random.setstate(drawn)

    form = (template, tuple(message["role"] for message in messages), tuple(sorted(options)))
    if form not in _tried:
        if trouble := _trial(apply):
            raise UnboundedTemplateError(f"takes more than {trouble} for one prompt")
        _tried.add(form)
    text = apply()
    if (found := _ADDRESS.search(text)) and not any(found[0] in message.get("content", "") for message in messages):
        raise UnboundedTemplateError(
            f"writes a place in memory ({found[0].strip()}), so its text would be another one in each run"
        )
    return text


def _trial(work: Callable[[], Any]) -> str | None:
    """What is used up when a forked child does the work; None if it ends, even by an error, which comes again here."""
    if "fork" not in multiprocessing.get_all_start_methods():  # Windows has no limits to set either
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, whose locks the work does not need
        child = os.fork()
    if not child:
        code = 1
        try:
            _limit()
            work()
            code = 0
        except MemoryError:
            code = 2
        except BaseException:
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"{SECONDS} s"
    return None if status == 0 else f"{BYTES / 2**30:g} GiB"


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Path("/proc/self/statm")  # of Linux; others do not enforce the limit
    if pages.is_file():
        taken = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
