"""What a column of times means: seconds, milliseconds, ... since 1970, dates, or plain numbers that only order interactions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from statistics import median
from typing import Any

from recbole_llm.convert.values import shown
from recbole_llm.data.times import unix_unit

_FORMATS = (
    *("%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%a %b %d %H:%M:%S %z %Y", "%d %b %Y", "%d %b %Y %H:%M", "%b %d, %Y"),
    *("%B %d, %Y", "%d-%b-%Y", "%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%m %d, %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
_EXAMPLE = "--time_format='%d/%m/%Y %H:%M'"


@dataclass(frozen=True)
class Times:
    """How a time is read.

    Attributes:
        said: what was understood, in words.
        read: from a value to seconds since 1970 (UTC), or to a number that orders; raises ValueError with the reason.
    """

    said: str
    read: Callable[[Any], float]


def understood(samples: Sequence[Any], form: str | None = None) -> Times:
    """What the first values of a column say; ``form`` is that of :meth:`datetime.datetime.strptime`.

    Raises:
        ValueError: they are neither numbers nor dates of a known form, or the month may be the day; it says what to give.
    """
    known = [value for value in samples if value is not None and value != "" and value == value]
    if not known:
        raise ValueError("it has no values; leave the column out with --columns=\"{'time': None}\"")
    if form:
        return Times(f"dates of the form {form}{_zone(form)}", _reader(lambda text: datetime.strptime(text, form), form))
    numbers = [_number(value) for value in known]
    if None not in numbers:
        return _numeric([one for one in numbers if one is not None])
    first = next(value for value, one in zip(known, numbers, strict=True) if one is None)
    if isinstance(first, datetime) or all(_succeeds(_iso, value) for value in known):
        texts = [str(value) for value in known]
        zone = "" if _iso(known[0]).tzinfo else ", without a time zone, so taken as UTC"
        if all(len(text) <= 10 for text in texts):
            zone = ": days without a time, so interactions of one day are tied"
        return Times(f"ISO dates{zone}", _reader(_iso, "2020-01-31 or 2020-01-31T12:00:00"))
    both = [f"{start}{clock}" for clock in _CLOCKS for start in ("%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y")]
    forms = [one for one in (*_FORMATS, *both) if all(_succeeds(_by(one), str(value)) for value in known)]
    if len(forms) == 1:
        return Times(f"dates of the form {forms[0]}{_zone(forms[0])}", _reader(_by(forms[0]), forms[0]))
    if forms:
        raise ValueError(
            f"{shown(known[0])} may have the day or the month first; give --time_format='{forms[0]}' or '{forms[1]}'"
        )
    raise ValueError(f"{shown(first)} is neither a number nor a date of a known form; give its form, such as {_EXAMPLE}")


def _numeric(numbers: Sequence[float]) -> Times:
    middle = median(numbers)
    if 19_000_101 <= middle <= 21_001_231 and all(_succeeds(_by("%Y%m%d"), f"{one:.0f}") for one in numbers):
        said = "dates as numbers, year, month and day; interactions of one day are tied"
        return Times(said, _reader(_by("%Y%m%d"), "20200131"))
    known = unix_unit(middle)
    if known is None:
        return Times("numbers that order the interactions, not dates; they are taken as they are", _plain)
    least, unit, size = known
    most = least * 1000

    def read(value: Any) -> float:
        exact = int(value) if isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit()) else _plain(value)
        if exact >= most or (size > 1 and exact < least):
            raise ValueError(f"is not a time in {unit}, as the first rows have them; write all times in one unit")
        return exact if size == 1 else exact / size

    return Times(f"Unix {unit}{'' if size == 1 else ', written as seconds'}", read)


def _plain(value: Any) -> float:
    found = _number(value)
    if found is None:
        raise ValueError("is not a number, as the first rows are; fill it in, or remove the row")
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) or (isinstance(value, str) and value[:1] in "-+.0123456789"):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            return None
        return found if math.isfinite(found) else None
    return None


def _iso(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    text = str(value).strip()
    return datetime.fromisoformat(text.removesuffix(" UTC"))


def _by(form: str) -> Callable[[str], datetime]:
    return lambda text: datetime.strptime(text.strip(), form)


def _reader(parse: Callable[[Any], datetime], form: str) -> Callable[[Any], float]:
    @lru_cache(1 << 16)
    def seconds(value: Any) -> float:
        moment = parse(value)
        found = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        return int(found) if found.is_integer() else found

    def read(value: Any) -> float:
        try:
            return seconds(value if isinstance(value, datetime) else str(value).strip())
        except (ValueError, OverflowError):
            raise ValueError(f"is not a date of the form {form}; correct it, or remove the row") from None

    return read


def _succeeds(read: Callable[[Any], Any], value: Any) -> bool:
    try:
        read(value)
    except (ValueError, OverflowError):
        return False
    return True


def _zone(form: str) -> str:
    return "" if "%z" in form else ", without a time zone, so taken as UTC"
