"""What a tower reads: training rows, prompts, collaborative states, and what there is without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_llm.data import domains
from recbole_llm.model.laser.towers import Towers
from recbole_llm.model.laser.training import TowerTraining
from tests.model.laser.conftest import (
    QUICK,
    Made,
    close,
    run_stages,
)

# -- rows --------------------------------------------------------------------------------------------------------------


def test_validation_and_test_items_are_never_training_targets(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("Laser", settings, train_samples=None, phase1_epochs=1)
    parts = made.model.parts
    users = [items.tolist() for items in parts.histories.items[1:]]
    allowed = sorted((items[:end], items[end]) for items in users for end in range(1, len(items) - 2))
    rows = domains.training_examples([parts.domain], samples=None, seed=0)
    pairs = [
        (parts.domain.histories[row.user][: row.end].tolist(), int(parts.domain.histories[row.user][row.end])) for row in rows
    ]
    assert sorted(pairs) == allowed and len(allowed) > 200
    fed: list[tuple[list[int], int]] = []

    def spied(training: TowerTraining, towers: Towers, tokens: int) -> Any:
        def loss(histories: list[list[int]], targets: list[int]) -> list[Any]:
            fed.extend(zip(histories, targets, strict=True))
            assert towers.user.suffix is not None
            return [towers.user.suffix.sum]

        return loss

    monkeypatch.setattr(TowerTraining, "loss", spied)
    run_stages(made)
    assert len(fed) > 1.9 * len(allowed)  # an epoch of each phase, but for a batch that is not full
    assert all(row in allowed for row in fed)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["suffix", "eos", "mean"])
def test_a_vector_is_that_of_a_plain_forward_over_embeddings_put_together_by_hand(trained: Any, pooling: str) -> None:
    """Prefix, text, suffix or end-of-text: read at the last token, or averaged."""
    made = trained(**QUICK, pooling=pooling)
    model, tower = made.model, made.model.towers.user
    embed, history = made.lm.get_input_embeddings(), [3, 1, 4, 15, 9, 2]
    text = embed.weight[model.reader.prompts.prompt(history).ids]
    prefix, _ = tower.m_former(*model.cf.sequence_states([history]))
    ends = {"suffix": tower.suffix, "eos": embed.weight[[model.reader.causal.tokenizer.eos_token_id]], "mean": text[:0]}
    inputs = torch.cat([prefix[0], text, ends[pooling]])[None]  # [1, T, D]
    hidden = made.lm.model(inputs_embeds=inputs).last_hidden_state[0]
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    close(model.encode_histories([history])[0], vector / vector.norm())


def test_the_prompt_numbers_its_lines_and_has_year_and_genre_in_brackets(assemble: Any, module_settings: dict[str, Any]) -> None:
    def lines(**changes: Any) -> list[str]:
        model = assemble("Laser", module_settings, **{"prompt": "laser", "history_label": ">> {k}. ", **changes}).model
        ids, tokenizer = model.parts.histories.item_ids, model.parts.backbone.tokenizer
        builder = model.parts.builder(tokenizer, names=model.texts)
        text = tokenizer.decode(builder.prompt([ids.index("i3"), ids.index("i10")]).ids)
        return text.removesuffix("\n").split("\n")[1:]

    titles, told = ["The old river", "The red wolf"], ["year: 1983, genre: drama film", "year: 1990, genre: comedy film"]
    assert lines() == [f">> {i + 1}. {titles[i]} ({told[i]})" for i in range(2)]  # year_field and category_field are set
    assert lines(text_fields=["genre"])[1] == ">> 2. The red wolf (genre: comedy film)"
    assert lines(text_fields=[], history_label="") == titles


# -- without states ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_training_never_saw_has_no_state_and_yet_a_vector(trained: Any) -> None:
    model = trained(**QUICK, new_items=0.2).model
    new = [item for item in range(1, 41) if not model.parts.histories.train_counts[item]]
    old = [item for item in range(1, 41) if item not in new]
    assert len(new) >= 8 and not model.reader._has_state[new].any() and model.reader._has_state[old].all()
    vectors = model.encode_histories([new[:1], new[:3], []])  # of items, users and nobody
    assert vectors.isfinite().all() and model.item_matrix[new].isfinite().all()
    close(vectors.norm(dim=1), torch.ones(3))
    assert len(model.item_matrix[new].unique(dim=0)) == len(new)  # their texts tell them apart
    states, known = model.reader.states([new[:3], [old[0], new[0], old[1]]])
    assert known.sum(1).tolist() == [0, 2]
    close(states[1], model.cf.sequence_states([old[:2]])[0][0])
    prefixes = model.towers.user(*model.reader.states([new[:1], new[1:4], []]))[0]
    assert torch.equal(prefixes[0], prefixes[1]) and torch.equal(prefixes[0], prefixes[2])  # the null token's


@pytest.mark.parametrize("threshold", [0, 1, 9])
def test_an_item_has_a_state_from_so_many_training_interactions_on(
    assemble: Any, module_settings: dict[str, Any], threshold: int
) -> None:
    """But an item that training never saw has none, and neither has the padding item."""
    made = assemble("Laser", module_settings, cold_threshold=threshold)
    model = made.model
    made.trainer.cache.run(model.cf.stage)
    met = [0] * 41
    for items in model.parts.histories.items[1:]:
        for item in items[:-2].tolist():  # neither the validation nor the test item counts
            met[item] += 1
    known = model._reader(made.trainer.cache)._has_state.tolist()
    assert known == [count >= max(1, threshold) for count in met] and sum(known) == {0: 40, 1: 40}.get(threshold, sum(known))
    assert threshold < 9 or 5 < sum(known) < 35


@torch.no_grad()
def test_the_states_that_are_read_are_those_that_cf_states_names(trained: Any, made: Made) -> None:
    history = [3, 1, 4]
    items, none = trained(**QUICK, cf_states="items").model, trained(**QUICK, cf_states="none").model
    close(items.reader.states([history])[0][0], items.cf.model.item_embedding.weight[history])
    assert not none.reader.states([history])[1].any() and none.encode_histories([history]).isfinite().all()
    close(made.model.reader.states([history])[0][0], made.model.cf.sequence_states([history])[0][0])


@torch.no_grad()
@pytest.mark.parametrize("states", ["states", "items"])
def test_no_more_of_a_history_is_read_in_training_than_at_test(trained: Any, made: Made, states: str) -> None:
    """RecBole's rows, which the test reads, have the last ``MAX_ITEM_LIST_LENGTH`` items; training has whole histories."""
    model = made.model if states == "states" else trained(**QUICK, cf_states=states).model
    cut = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3] * (model.max_seq_length // 10)
    for one, other in zip(model.reader.states([[7, 8, *cut]]), model.reader.states([cut]), strict=True):
        close(one, other)
