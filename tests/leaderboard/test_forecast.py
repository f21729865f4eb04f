"""The forecast of a merge's gain from its adapters: made records with a known answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from recbole_llm import cli
from recbole_llm.leaderboard.forecast import Forecast, forecast, spearman
from recbole_llm.leaderboard.merges import OWN, UNIFORM
from recbole_llm.store.json_files import sealed

USERS = 40


def ranks(hits: int) -> dict[str, int]:
    """Ranks of users, ``hits`` of them 1 and the others 2."""
    return {f"u{user}": 1 if user < hits else 2 for user in range(USERS)}


def record(folder: Path, number: int, hits: dict[str, int], pair: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write the record of a cocktail; ``hits`` are those of its rows, by name."""
    rows = {name: ranks(value) for name, value in {"base spirit": 10, "ingredient": 20, **hits}.items()}
    names = "base spirit", "ingredient"
    merge = {"method": "entropy", "sources": [{"name": name, "sha256": f"{name} {number}"} for name in names], "trace": []}
    features = {"cosine": None, "cosine_mean": None, "norm_ratio": None, "entropy_gap": None, "adapters": [*names]}
    content = {
        "model": "LoRACocktail",
        "dataset": f"data {number}",
        "backbone": "lm",
        "backbone_fingerprint": "f",
        "seed": 1,
        "results": {name: {"hit@1": float(np.mean([rank == 1 for rank in own.values()]))} for name, own in rows.items()},
        "ranks": rows,
        "slices": {},
        "config": {"seed": 1},
        "passport": {"filters": {}, "sha256": "s"},
        "protocol": {"mask_history": None},
        "merge": merge | ({} if pair is None else {"pairs": [features | pair]}),
        "written": f"{number:03d}",
        **changes,
    }
    content["config"] = {**content["config"], "seed": content["seed"]}
    folder = folder / "saved" / "runs" / f"{number}-{content['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(sealed(content))
    return folder


def many(folder: Path, cosines: Sequence[float], gains: Sequence[int], uniform: int = 20) -> Path:
    """Records whose mixtures have ``gains`` more hits than the better adapter."""
    for number, (cosine, gain) in enumerate(zip(cosines, gains, strict=True)):
        record(folder, number, {"LoRACocktail": 20 + gain, "uniform mix": uniform}, {"cosine": cosine})
    return folder


def of(found: Forecast, feature: str, mixture: str = OWN) -> Any:
    return next(c for c in found.correlations if (c.feature, c.mixture) == (feature, mixture))


# -- points --------------------------------------------------------------------------------------------------------------------


def test_a_gain_is_the_paired_difference_from_the_better_adapter(tmp_path: Path) -> None:
    path = record(tmp_path, 0, {"LoRACocktail": 26, "uniform mix": 18}, {"cosine": 0.3, "norm_ratio": 0.5, "entropy_gap": -0.2})
    (merge,) = forecast([path]).merges
    assert merge.better == "ingredient" and merge.users == USERS and merge.method == "entropy"
    own, mix = merge.gains[OWN], merge.gains[UNIFORM]
    assert own.value == pytest.approx(6 / USERS) and mix.value == pytest.approx(-2 / USERS)
    half = 1.96 * np.std([1] * 6 + [0] * 34) / np.sqrt(USERS)  # the bootstrap's, nearly
    assert own.low == pytest.approx(6 / USERS - half, abs=0.03) and own.high == pytest.approx(6 / USERS + half, abs=0.03)
    values = [*merge.features.values()]
    assert values[:4] == [0.3, None, pytest.approx(np.log(2)), 0.2] and values[4] is None


def test_a_given_adapter_is_found_by_its_row_and_a_uniform_model_is_its_own_mix(tmp_path: Path) -> None:
    given = {"base spirit": {"folder": "f", "sha256": "0123456789"}}
    rows = {"LoRACocktail": 32, "base spirit (given 01234567)": 30}
    path = record(tmp_path, 0, rows, {"cosine": 0.3}, given_adapters=given)
    content = json.loads((path / "record.json").read_text())
    content["merge"]["method"] = "uniform"
    (path / "record.json").write_text(sealed({key: value for key, value in content.items() if key != "checksum"}))
    (merge,) = forecast([path]).merges
    assert merge.better == "base spirit (given 01234567)"
    assert merge.gains[OWN] == merge.gains[UNIFORM] and merge.gains[OWN].value == pytest.approx(2 / USERS)


def test_seeds_are_one_point_and_the_newest_record_of_each_counts(tmp_path: Path) -> None:
    for place, (seed, hits) in enumerate([(1, 30), (1, 22), (2, 24)]):
        own = {"dataset": "d", "seed": seed, "written": f"{place}"}
        record(tmp_path / str(place), 0, {"LoRACocktail": hits}, {"cosine": 0.1 * seed}, **own)
    (merge,) = forecast([tmp_path]).merges
    assert merge.seeds == [1, 2] and merge.gains[OWN].value == pytest.approx(3 / USERS)
    assert [*merge.features.values()][0] == pytest.approx(0.15) and UNIFORM not in merge.gains


def test_seeds_that_were_computed_or_logged_in_another_way_are_one_point(tmp_path: Path) -> None:
    for seed, how in ((1, {"device": "cpu", "show_progress": True}), (2, {"device": "cuda", "show_progress": False})):
        record(tmp_path / str(seed), 0, {"LoRACocktail": 24}, {"cosine": 0.1}, seed=seed, dataset="d", config=how)
    assert [merge.seeds for merge in forecast([tmp_path]).merges] == [[1, 2]]


def test_a_run_with_one_user_is_left_out_since_its_gain_has_no_interval(tmp_path: Path) -> None:
    one = {"ranks": {name: {"u1": 1} for name in ("LoRACocktail", "base spirit", "ingredient")}}
    one["results"] = {name: {"hit@1": 1.0} for name in one["ranks"]}
    path = record(tmp_path, 0, {"LoRACocktail": 24}, {"cosine": 0.1}, **one)
    with pytest.raises(ValueError, match="has one user, of whom there is no interval"):
        forecast([path])


def test_the_seeds_of_a_builtin_lm_which_is_another_one_with_each_are_one_point(tmp_path: Path) -> None:
    for seed in (1, 2):
        own = {"seed": seed, "dataset": "d", "backbone_fingerprint": f"of seed {seed}", "config": {"llm_path": "builtin"}}
        record(tmp_path / str(seed), 0, {"LoRACocktail": 24}, {"cosine": 0.1}, **own)
    assert [merge.seeds for merge in forecast([tmp_path]).merges] == [[1, 2]]


def test_seeds_shared_without_ids_of_users_are_not_averaged_by_user(tmp_path: Path) -> None:
    for seed, hits in ((1, 30), (2, 24)):
        own = {"seed": seed, "dataset": "d", "written": f"{seed}", "user_ids": False}
        record(tmp_path, 0, {"LoRACocktail": hits}, {"cosine": 0.1}, **own)
    (merge,) = forecast([tmp_path]).merges
    assert merge.seeds == [2] and merge.gains[OWN].value == pytest.approx(4 / USERS)


def test_the_even_mix_of_the_same_adapters_is_one_point(tmp_path: Path) -> None:
    many(tmp_path, [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4])
    record(
        tmp_path / "b", 0, {"LoRACocktail": 30, "uniform mix": 20}, {"cosine": 0.1}, config={"merge": "grid"}, dataset="data 0"
    )
    found = forecast([tmp_path])
    assert of(found, "cosine of the updates").points == 5 and of(found, "cosine of the updates", UNIFORM).points == 4


# -- tests ---------------------------------------------------------------------------------------------------------------------


def test_a_perfect_order_is_found_and_its_p_value_is_exact(tmp_path: Path) -> None:
    found = forecast([many(tmp_path, [0.1, 0.5, 0.3, 0.9, 0.7, 0.2], [0, 3, 2, 5, 4, 1])])
    own, flat = of(found, "cosine of the updates"), of(found, "cosine of the updates", UNIFORM)
    assert own.rho == pytest.approx(1) and own.p == pytest.approx(2 / 720) == own.adjusted and own.points == 6
    assert flat.points == 6 and flat.p is flat.rho is None  # all gains are 0
    assert found.verdict == (
        "yes: the nearest is cosine of the updates with the gain of the model's mixture: rho +1.00, adjusted p 0.003, n = 6"
    )


def test_no_order_is_an_honest_no(tmp_path: Path) -> None:
    found = forecast([many(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5], [2, 4, 1, 3, 0])])
    assert found.verdict.startswith("no: the nearest is cosine of the updates") and of(found, "cosine of the updates").p > 0.2


def test_three_merges_decide_nothing(tmp_path: Path) -> None:
    found = forecast([many(tmp_path, [0.1, 0.2, 0.3], [1, 2, 3])])
    assert found.verdict.startswith("not decidable: 3 merges") and all(c.p is None for c in found.correlations)


def test_the_p_value_is_the_share_of_all_orders() -> None:
    first, second = [0.1, 0.4, 0.2, 0.9, 0.9], [3.0, 2.0, 1.0, 5.0, 4.0]
    rho, p = spearman(first, second)
    orders = [stats.spearmanr(order, second).statistic for order in itertools.permutations(first)]
    upper, lower = (np.mean([sign * order >= sign * rho - 1e-9 for order in orders]) for sign in (1, -1))  # type: ignore[operator]
    assert rho == pytest.approx(stats.spearmanr(first, second).statistic)
    assert p == pytest.approx(min(1, 2 * min(upper, lower)))


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_tests_and_writes_figure_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many(tmp_path, [0.1, 0.5, 0.3, 0.9, 0.7, 0.2], [0, 3, 2, 5, 4, 1])
    record(tmp_path, 90, {"LoRACocktail": 26}, {"cosine": 0.1}, ranks={})
    record(tmp_path, 91, {"Pop": 26}, model="Pop", merge=None)  # no merge, so nothing to tell
    record(tmp_path, 93, {"LoRACocktail": 26}, {"cosine": 0.1}, evaluates="LoRACocktail-tiny-0")  # a merge that is known
    damaged = record(tmp_path, 92, {"LoRACocktail": 26}, {"cosine": 0.1}) / "record.json"
    damaged.write_text(damaged.read_text().replace("data 92", "data 93"))
    cli.main(["forecast", str(tmp_path / "saved" / "runs"), f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    assert "data 0" in shown and "forecast: yes: the nearest is cosine" in shown and "91-1" not in shown
    assert "has no ranks, or no hit@1, of the row LoRACocktail" in shown and "is damaged or was edited" in shown
    assert "is LoRACocktail-tiny-0, evaluated again" in shown
    content = json.loads((tmp_path / "out" / "forecast.json").read_text())
    assert content["metric"] == "hit@1" and len(content["merges"]) == 6 and len(content["correlations"]) == 10
    assert imread(tmp_path / "out" / "forecast.png").std() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forecast"], "the following arguments are required: RUN"),
        (["forecast", "nowhere"], "forecast: there is no record of a run at nowhere; give folders of runs"),
        (["forecast", "x", "--seed=3"], "no option --seed"),
    ],
)
def test_mistakes_end_in_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
