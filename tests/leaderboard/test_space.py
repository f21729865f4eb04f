"""A search file is RecBole's, and its values are literals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recbole_llm.config import LLMConfig
from recbole_llm.config.property_files import properties_folder
from recbole_llm.leaderboard.space import distribution, read_space


def test_a_search_file_is_recboles(tmp_path: Path) -> None:
    file = tmp_path / "BPR.hyper"
    file.write_text(
        "# a comment\nlearning_rate loguniform -8, 0\nembedding_size choice [32, 64]\n\n"
        "mlp_hidden_size choice ['[64,64]', '[128]']\nreg uniform 0,1\nn_layers quniform 1, 4, 1\n"
    )
    assert read_space(file) == {
        "learning_rate": ("loguniform", [-8, 0]),
        "embedding_size": ("choice", [32, 64]),
        "mlp_hidden_size": ("choice", ["[64,64]", "[128]"]),
        "reg": ("uniform", [0, 1]),
        "n_layers": ("quniform", [1, 4, 1]),
    }


def test_bounds_are_as_in_hyperopt() -> None:
    rate, reg = distribution("loguniform", [-8, 0]), distribution("uniform", [0, 1])
    assert (rate.low, rate.high, rate.log) == (pytest.approx(np.exp(-8)), 1.0, True), "natural logarithms"
    assert (reg.low, reg.high, reg.log, reg.step) == (0, 1, False, None)
    layers, dropout = distribution("quniform", [1, 4, 1]), distribution("quniform", [0.12, 0.58, 0.1])
    assert (layers.low, layers.high, layers.step, type(layers.to_external_repr(2.0))) == (1, 4, 1, int)
    assert (dropout.low, dropout.high, dropout.step) == (0.1, 0.6, 0.1), "multiples of the step"


@pytest.mark.parametrize(
    "line",
    [
        "reg choice [__import__('pathlib').Path('owned').touch()]",
        "reg uniform __import__('pathlib').Path('owned').touch(), 1",
        "reg choice",
        "reg choice []",
        "reg choice 3",
        "reg uniform 1",
        "reg uniform 1, 0",
        "reg uniform 'a', 'b'",
        "reg normal 0, 1",
        "reg quniform 0, 1",
        "reg quniform 0, 1, 0",
        "reg uniform 0, 1e999",
        "reg loguniform 0, 1000",
    ],
)
def test_a_line_that_is_no_search_is_shown_and_nothing_is_executed(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.hyper"
    file.write_text(f"epochs choice [1]\n{line}\n")
    with pytest.raises(ValueError, match=r"x\.hyper, line 2: .* has none of the forms: KEY choice"):
        read_space(file)
    assert not Path("owned").exists()


@pytest.mark.parametrize("key", ["seed", "candidates", "eval_args", "eval_users", "new_items", "topk", "valid_users"])
def test_what_is_measured_is_not_searched(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.hyper").write_text(f"{key} choice [1, 2]\n")
    with pytest.raises(ValueError, match=f"`{key}` cannot be compared"):
        read_space(tmp_path / "x.hyper")


@pytest.mark.parametrize("file", sorted((properties_folder() / "search").iterdir()), ids=lambda file: file.stem)
def test_the_spaces_that_come_with_the_package_are_of_keys_of_their_models(file: Path) -> None:
    values = {key: choices[0] for key, (_, choices) in read_space(file).items()}
    config = LLMConfig(file.stem, "tiny", config_dict=values)
    plain = LLMConfig(file.stem, "tiny")
    assert all(key in plain.final_config_dict and config[key] == value for key, value in values.items())


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "x.hyper").write_text("# nothing\n")
    with pytest.raises(ValueError, match="the file is empty"):
        read_space(tmp_path / "x.hyper")
    (tmp_path / "x.hyper").write_text("reg choice [1]\nreg uniform 0, 1\n")
    with pytest.raises(ValueError, match="line 2: `reg` is given twice"):
        read_space(tmp_path / "x.hyper")
    with pytest.raises(FileNotFoundError, match="--params_file: nowhere does not exist"):
        read_space(Path("nowhere"))
