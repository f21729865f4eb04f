from __future__ import annotations

import pytest

from recbole_llm.leaderboard import page as pages
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Leaderboard
from tests.leaderboard.boards import NASTY, SCRIPT, cell


@pytest.fixture(scope="session")
def board() -> Leaderboard:
    return build(
        [
            *(cell(SCRIPT, 0.6, seed=seed, facts={"backbone": "builtin <2M>"}) for seed in (1, 2, 3)),
            cell(NASTY, 0.1, note=f"lr in {SCRIPT}"),
            cell("Middle", 0.35),
            cell("Broken", error=f"no memory {SCRIPT}"),
            cell("Later"),
            cell("Bare", 0.2, facts={"slices": None, "seconds": None}),
            cell("Alone", 0.4, protocol="full & all"),
        ],
        title=f"ml-100k {SCRIPT}",
    )


@pytest.fixture(scope="session")
def page(board: Leaderboard) -> str:
    return pages.to_html(board)
