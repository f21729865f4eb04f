"""Times that nobody can have meant are told; those that only order interactions are not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.data.times import dates, odd_times
from recbole_llm.quick_start import run_recbole_llm

SECONDS = 1_500_000_000 + np.arange(10, dtype=float) * 86_400


def replaced(times: np.ndarray, **values: float) -> np.ndarray:
    changed = times.copy()
    changed[[int(place[1:]) for place in values]] = [*values.values()]
    return changed


@pytest.mark.parametrize(
    "times",
    [
        SECONDS,
        SECONDS * 1000,
        SECONDS * 1e9,
        np.arange(1, 50.0),
        np.zeros(5),
        np.empty(0),
        np.full(3, np.nan),
        -SECONDS,
        np.full(4, 2e20),
    ],
)
def test_times_of_one_unit_and_numbers_that_only_order_are_fine(times: np.ndarray) -> None:
    assert odd_times(times) == []


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            replaced(SECONDS, p3=0.0, p4=-1.0),
            "2 of 10 times are 0 or less, such as 0; the others are in seconds, 2017-07-14 to 2017-07-23",
        ),
        (replaced(SECONDS, p1=12.0), "1 of 10 times are from 1970 to March 1973, such as 12; "),
        (replaced(SECONDS, p1=1_500_000_000_000.0), "1 of 10 times are in milliseconds, such as 1500000000000; "),
        (
            replaced(SECONDS * 1000, p0=1_500_000_000.0),
            "1 of 10 times are in seconds, such as 1500000000; the others are in milliseconds",
        ),
        (np.array([0.0] * 6 + [1.5e9] * 4), "6 of 10 times are 0 or less, such as 0; "),
        (np.array([1.5e9, 1.5e14]), "1 of 2 times are in "),
        (replaced(SECONDS, p9=9e21), "1 of 10 times are beyond any calendar, such as 9e+21; "),
    ],
)
def test_others_are_counted_with_an_example(times: np.ndarray, said: str) -> None:
    (found,) = odd_times(times)
    assert found.startswith(said)
    moments = dates(times)
    assert moments is not None and 0 < len(moments) < len(times)


def test_a_run_tells_them_with_file_and_column(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(Path(settings["data_path"]) / "tiny", tmp_path / "data" / "tiny")
    file = folder / "tiny.inter"
    header, first, *others = file.read_text().splitlines()
    place = header.split("\t").index("timestamp:float")

    def moved(line: str, by: float) -> str:
        cells = line.split("\t")
        cells[place] = str(float(cells[place]) + by)
        return "\t".join(cells)

    file.write_text("\n".join([header, moved(first, 1.5e12), *(moved(line, 1.5e9) for line in others)]) + "\n")
    run_recbole_llm("Pop", "tiny", config_dict=settings | {"data_path": str(tmp_path / "data")})
    said = f"tiny.inter, column timestamp: 1 of {len(others) + 1:,} times are in milliseconds"
    assert [line for line in caplog.messages if line.startswith(said)]
