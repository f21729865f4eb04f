"""Stage 1 by itself: who is paired with what, which weights move, what is written, and the shapes of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recbole_llm.data.domains import Domain
from recbole_llm.llm.builtin_text_encoder import builtin_stage
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import TextEncoder, load_text_encoder
from recbole_llm.model.allmrec import alignment, alignment_training
from recbole_llm.model.allmrec.alignment import Alignment, LossWeights, Projector, mismatch, spread
from recbole_llm.model.allmrec.alignment_training import AlignmentConfig, AlignmentTraining
from recbole_llm.store.files import sha256_file
from recbole_llm.store.stages import Work
from recbole_llm.training.loop import LoopOptions, TrainingLoop

ITEMS, HIDDEN, TEXT = 12, 6, 10
HISTORIES = [[1, 2, 3, 4], [5, 6], [7], [2, 8, 9], [], [10, 4, 1]]
CONFIG = AlignmentConfig(
    joint_size=5,
    weights=LossWeights(),
    tune_text_encoder=True,
    all_positions=False,
    samples=None,
    epochs=3,
    batch_size=2,
    learning_rate=1e-2,
    max_grad_norm=1.0,
    seed=7,
)
SENTENCES = ["", *(f"the {colour} {thing}" for colour in ("red", "blue", "old") for thing in ("river", "house", "wolf", "sea"))]
SENTENCES = SENTENCES[:ITEMS]
NO_RESULTS: Any = SimpleNamespace(folder=lambda stage: None)  # of stages before the one that is built


@pytest.fixture(scope="module")
def domain() -> Domain:
    return Domain("made", None, [np.array(row, dtype=np.int64) for row in HISTORIES], "item", "chosen")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    builtin_stage(SENTENCES, dim=TEXT, vocab_size=300, seed=0).build(Work(folder, folder, NO_RESULTS))
    return folder


@pytest.fixture
def encoder(encoder_folder: Path) -> Callable[[], TextEncoder]:
    """Load the same text encoder anew, as each process does."""
    return lambda: load_text_encoder(encoder_folder, device="cpu")


class Known:
    """A collaborative model that notes for whom its states are read."""

    device = torch.device("cpu")
    stage = None

    def load(self, folder: None) -> None:
        """There is nothing to read."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.item_table = torch.randn(ITEMS, HIDDEN, generator=draw)
        self.states = torch.randn(len(HISTORIES) + 1, HIDDEN, generator=draw)
        self.read: list[tuple[int, list[int]]] = []

    def user_states(self, users: Sequence[int], histories: Sequence[Sequence[int]]) -> torch.Tensor:
        self.read += zip(users, map(list, histories), strict=True)
        return self.states[list(users)]


@pytest.fixture
def train(domain: Domain, encoder_folder: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """``train(**settings)``: stage 1 with a spy on its loop; what it read, what it trained from which weights, what it wrote."""
    settings = {
        "text_encoder_path": str(encoder_folder),
        "text_encoder_revision": None,
        "builtin_text_encoder": {},
        "device": "cpu",
    }
    settings |= {"show_progress": False, "checkpoint_dir": str(tmp_path)}

    def train(name: str = "out", save_every: float = 20.0, **changes: Any) -> SimpleNamespace:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        torch.manual_seed(0)
        made = SimpleNamespace(folder=out, cf=Known(), encoder=None, before={}, parameters={}, losses=[])
        run, step, load = TrainingLoop.run, TrainingLoop._step, TextBackbone.load

        def spy_run(loop: TrainingLoop) -> Any:
            made.parameters = loop.parameters
            made.before = {key: parameter.detach().clone() for key, parameter in loop.parameters.items()}
            return run(loop)

        def spy_load(text: TextBackbone, results: Any) -> TextEncoder:
            made.encoder = load(text, results)
            return made.encoder

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextBackbone, "load", spy_load)
            patch.setattr(TrainingLoop, "run", spy_run)
            patch.setattr(TrainingLoop, "_step", lambda loop: (made.losses.append(step(loop)), made.losses[-1])[1])
            training = AlignmentTraining(
                replace(CONFIG, **changes),
                domain,
                made.cf,
                TextBackbone(settings, SENTENCES),
                LoopOptions(save_every=save_every, show_progress=False),
            )
            training._build(Work(out, tmp_path / f"{name}.scratch", NO_RESULTS))
        made.codes, made.weights = load_file(out / "codes.safetensors"), load_file(out / "alignment.safetensors")
        return made

    return train


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# -- pairs -------------------------------------------------------------------------------------------------------------


def pairs(domain: Domain, **changes: Any) -> list[tuple[int, list[int], int, int]]:
    batches = alignment_training._Pairs(domain, replace(CONFIG, **changes))
    return [sample for step in range(len(batches)) for sample in zip(*batches[step], strict=True)]


def test_an_epoch_holds_each_users_last_training_item_after_the_items_before_it(domain: Domain) -> None:
    found = pairs(domain, epochs=1, batch_size=1)
    assert sorted(row[:3] for row in found) == [(1, [1, 2, 3], 4), (2, [5], 6), (4, [2, 8], 9), (6, [10, 4], 1)]


def test_all_positions_are_every_item_but_a_users_first(domain: Domain) -> None:
    found = pairs(domain, epochs=1, batch_size=1, all_positions=True)
    expected = [(u + 1, row[:end], row[end]) for u, row in enumerate(HISTORIES) for end in range(1, len(row))]
    assert sorted(row[:3] for row in found) == sorted(expected) and len(expected) == 8
    assert len(pairs(domain, epochs=1, batch_size=1, all_positions=True, samples=5)) == 5


def test_sampled_items_are_trained_ones_outside_the_users_history_each_as_likely(domain: Domain) -> None:
    found = [row for row in pairs(domain, epochs=400, batch_size=4) if row[0] == 1]
    counts = np.bincount([sampled for *_, sampled in found], minlength=ITEMS)
    assert counts[[0, 1, 2, 3, 4, 11]].sum() == 0  # padding, the user's own, and one that nobody was trained on
    assert counts[5:11].min() > 40 and counts.sum() == 400  # 67 expected


def test_a_user_who_knows_every_item_does_not_search_forever() -> None:
    everything = Domain("all", None, [np.array([1, 2, 3])], "item", "chosen")  # type: ignore[arg-type]
    assert {sampled for *_, sampled in pairs(everything, batch_size=1)} <= {1, 2, 3}


def test_a_step_depends_on_its_number_and_the_seed_alone(domain: Domain) -> None:
    one, other = (alignment_training._Pairs(domain, CONFIG) for _ in range(2))
    late = other[4]
    assert len(one) == 6 and [one[step] for step in range(6)][4] == late
    assert pairs(domain) == pairs(domain) != pairs(domain, seed=8)
    by_epoch = [pairs(domain)[start : start + 4] for start in (0, 4, 8)]
    assert len({str(rows) for rows in by_epoch}) == 3  # another order, other samples
    assert len({str(sorted(row[:3] for row in rows)) for rows in by_epoch}) == 1


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", [True, False])
def test_both_autoencoders_are_trained_and_the_text_encoder_where_it_is_tuned(train: Any, encoder: Any, tune: bool) -> None:
    before = bits(encoder().model)
    made = train(tune_text_encoder=tune)
    layers = {f"alignment.{name}" for name, _ in Alignment(HIDDEN, TEXT, 5).named_parameters()}
    assert len(layers) == 8 and {name for name in made.parameters if name.startswith("alignment.")} == layers
    assert all(not torch.equal(made.before[name], parameter) for name, parameter in made.parameters.items())
    after = made.encoder.model.state_dict()
    assert len(made.parameters) == 8 + len(before) * tune
    assert all(torch.equal(after[name], tensor) != tune for name, tensor in before.items())
    assert not any(p.requires_grad for p in made.encoder.model.parameters()) and not made.encoder.model.training
    assert torch.equal(made.cf.item_table, Known().item_table)


def test_states_are_read_of_users_with_their_own_history(train: Any) -> None:
    read = train(epochs=1, batch_size=1).cf.read
    assert sorted(read) == [(1, [1, 2, 3]), (2, [5]), (4, [2, 8]), (6, [10, 4])]


@pytest.mark.parametrize("tune", [True, False])
def test_the_codes_are_those_of_the_saved_weights(train: Any, encoder: Any, tune: bool, tmp_path: Path) -> None:
    made = train(tune_text_encoder=tune)
    assert {name: tuple(codes.shape) for name, codes in made.codes.items()} == {"joint": (ITEMS, 5), "text": (ITEMS, 5)}
    assert all(codes.min() > 0 and codes.max() < 1 for codes in made.codes.values())
    again = Alignment(HIDDEN, TEXT, 5)
    again.load_state_dict(made.weights)
    assert (made.folder / "text_encoder").is_dir() == tune
    assert bool(list((tmp_path / "text_vectors").glob("*/tensors.safetensors"))) == (
        not tune
    )  # a tuned one has no vectors to share
    reader = load_text_encoder(made.folder / "text_encoder", device="cpu") if tune else encoder()
    again.requires_grad_(False)
    torch.testing.assert_close(again.text_codes(reader.encode(SENTENCES)), made.codes["text"])
    torch.testing.assert_close(again.item_codes(made.cf.item_table), made.codes["joint"])


def test_matching_brings_the_two_codes_of_an_item_together(train: Any) -> None:
    only = LossWeights(recommendation=0.0, matching=1.0, item_reconstruction=0.0, text_reconstruction=0.0)
    none = replace(only, matching=0.0, item_reconstruction=1.0)
    met = sorted({item for row in HISTORIES for item in row[-1:] if len(row) > 1})
    apart = [
        float((made.codes["joint"] - made.codes["text"])[met].square().mean())
        for made in (train("matched", weights=only, epochs=60), train("unmatched", weights=none, epochs=60))
    ]
    assert apart[0] < 0.2 * apart[1]


@pytest.mark.parametrize("tune", [True, False])
@pytest.mark.parametrize("die_at", [0, 3, 5])
def test_a_resumed_training_ends_as_an_uninterrupted_one(train: Any, die_at: int, tune: bool, tmp_path: Path) -> None:
    step = TrainingLoop._step

    def dying(loop: TrainingLoop) -> Any:
        if loop.state.step == die_at:
            raise KeyboardInterrupt
        return step(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train("killed", save_every=0, tune_text_encoder=tune)
    resumed, whole = train("killed", save_every=0, tune_text_encoder=tune), train("whole", tune_text_encoder=tune)
    assert len(resumed.losses) == 6 - die_at and len(whole.losses) == 6  # nothing is trained twice
    for file in ("codes.safetensors", "alignment.safetensors", *["text_encoder/model.safetensors"] * tune):
        assert sha256_file(resumed.folder / file) == sha256_file(whole.folder / file), file


# -- shapes and defaults -----------------------------------------------------------------------------------------------


def test_the_parts_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        autoencoders = Alignment(50, 768, 128)
        users, items = Projector(50, 4096, nn.LeakyReLU()), Projector(128, 4096, nn.GELU())
    shapes = {name: tuple(parameter.shape) for name, parameter in autoencoders.named_parameters() if "weight" in name}
    assert shapes == {
        "item_encoder.weight": (128, 50),
        "item_decoder.weight": (50, 128),
        "text_encoder.weight": (128, 768),
        "text_decoder.weight": (768, 128),
    }
    sizes = [sum(parameter.numel() for parameter in part.parameters()) / 1e6 for part in (users, items)]
    assert sizes == [pytest.approx(17.0, abs=0.05), pytest.approx(17.3, abs=0.05)]
    kinds = [[type(layer) for layer in part] for part in (users, items)]
    assert kinds == [[nn.Linear, nn.LayerNorm, kind, nn.Linear] for kind in (nn.LeakyReLU, nn.GELU)]


def test_projections_start_as_xavier_has_it() -> None:
    torch.manual_seed(0)
    first, _, _, last = Projector(60, 300, nn.GELU())
    assert first.weight.std().item() == pytest.approx((2 / 360) ** 0.5, rel=0.03)
    assert last.weight.std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.03)


@pytest.mark.parametrize(("beta", "large", "expected"), [(None, 14, 0.2), (None, 13, 0.5), (0.0, 13, 0.0), (0.9, 14, 0.9)])
def test_beta_is_the_papers_for_the_size_of_the_data_unless_it_is_given(
    monkeypatch: pytest.MonkeyPatch, beta: float | None, large: int, expected: float
) -> None:
    monkeypatch.setattr(alignment, "LARGE", large)
    ones = {"recommendation_weight": 1.0, "matching_weight": 1.0, "alpha": 1.0}
    config = {**ones, "beta": beta, "match_negatives": False, "logits": "sum"}
    assert LossWeights.of(config, interactions=13).text_reconstruction == expected


def test_the_spread_is_the_share_of_the_size_that_differs_between_items() -> None:
    same = torch.full((10, 4), 0.5)
    other = same + 0.1 * torch.tensor([[1.0], [-1.0]]).repeat(5, 1)
    assert spread(same) == 0 and spread(other) == pytest.approx(0.1 / (0.25 + 0.01) ** 0.5)


def test_codes_that_match_have_their_own_item_nearest_and_others_are_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, others = torch.rand(2, 400, 8, generator=generator)
    assert mismatch(codes, codes + 1e-3 * others) == 0
    assert 0.4 < mismatch(codes, others) < 0.6
    assert mismatch(torch.full((400, 8), 0.5) + 1e-3 * codes, torch.full((400, 8), 0.5) + 1e-3 * others) > 0.4
