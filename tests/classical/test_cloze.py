"""BERT4Rec on whole sequences: every item in a window, masked by RecBole's transform, and it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_llm.classical import building
from recbole_llm.classical.cloze import MaskedLoader, MaskedTraining, masked_loss
from recbole_llm.classical.fast_transformer import make_fast
from recbole_llm.classical.losses import SequenceLoss
from recbole_llm.classical.train_modes import trainer_class
from recbole_llm.classical.windows import training_histories
from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture
def prepared(settings: dict[str, Any]) -> tuple[Any, Any]:
    config = LLMConfig("BERT4Rec", "tiny", config_dict={**settings, "train_mode": "sequence", "MAX_ITEM_LIST_LENGTH": 5})
    train_data, *_ = data_preparation(config, create_dataset(config))
    return config, train_data


def test_windows_hold_every_item_and_end_with_the_history(prepared: tuple[Any, Any]) -> None:
    config, train_data = prepared
    histories = training_histories(train_data.dataset)
    for history in histories:
        loader = MaskedLoader([history], train_data.transform, train_data.dataset, config)
        windows = [row[:length].tolist() for row, length in zip(loader.items, loader.lengths, strict=True)]
        items = history.tolist()
        assert windows[-1] == items[-5:] and set(sum(windows, [])) == set(items)
        assert all(any(items[at : at + len(window)] == window for at in range(len(items))) for window in windows)


def test_a_batch_is_masked_as_recbole_masks_and_the_order_is_the_epochs(prepared: tuple[Any, Any]) -> None:
    config, train_data = prepared
    config["train_batch_size"] = 20
    loader = MaskedLoader(training_histories(train_data.dataset), train_data.transform, train_data.dataset, config)
    batches = list(loader)
    assert len(batches) == len(loader) > 1
    n_items = train_data.dataset.item_num
    for batch in batches:
        items, masked = batch["item_id_list"], batch["Mask_item_id_list"]
        hidden = masked != items
        assert (masked[hidden] == n_items).all() and (items[hidden] > 0).all()
    first = torch.cat([batch["item_id_list"] for batch in batches])
    torch.testing.assert_close(torch.cat([batch["item_id_list"] for batch in loader]), first)
    loader.epoch = 1
    other = torch.cat([batch["item_id_list"] for batch in loader])
    assert not torch.equal(other, first) and torch.equal(other.sort(0).values, first.sort(0).values)


def test_a_batch_of_one_short_window_has_a_mask_that_counts(prepared: tuple[Any, Any]) -> None:
    config, train_data = prepared
    short = [torch.tensor([1, 2])]
    loader = MaskedLoader(short, train_data.transform, train_data.dataset, config)
    model = building.build(config, train_data.dataset)
    for _ in range(20):  # most draws mask neither item, or the first one, which RecBole's loss does not count
        (batch,) = loader
        assert model.calculate_loss(batch).isfinite()


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_a_batch_without_a_mask_does_not_end_the_training_on_prefixes(loss_type: str, settings: dict[str, Any]) -> None:
    """Each batch is one row, and those of one item have no mask that counts."""
    changes = {"train_mode": "prefix", "loss_type": loss_type, "train_batch_size": 1, "n_layers": 1}
    config = LLMConfig("BERT4Rec", "tiny", config_dict={**settings, **changes})
    train_data, *_ = data_preparation(config, create_dataset(config))
    data = train_data.dataset
    assert (data.inter_feat["item_length"] == 1).any()
    model = building.build(config, data)
    before = model.item_embedding.weight.detach().clone()
    trainer = trainer_class(config)(config, model)
    assert trainer._train_epoch(train_data, 0) > 0  # without one NaN, which RecBole's trainer refuses
    assert model.item_embedding.weight.isfinite().all() and not torch.equal(model.item_embedding.weight, before)


def test_without_padding_the_loss_and_its_gradients_are_those_of_whole_windows(
    prepared: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_llm.classical.sequence.POSITIONS", 20)  # several groups
    config, train_data = prepared
    for key in ("hidden_dropout_prob", "attn_dropout_prob"):
        config[key] = 0.0
    loader = MaskedLoader(training_histories(train_data.dataset), train_data.transform, train_data.dataset, config)
    batch, model = next(iter(loader)), building.build(config, train_data.dataset)
    assert (batch["item_id_list"] == 0).sum() > 0, "some windows are padded"
    index = batch[model.MASK_INDEX]
    row, column = index.nonzero(as_tuple=True)
    logits = model(batch[model.MASK_ITEM_SEQ])[row, index[row, column]] @ model.item_embedding.weight[: model.n_items].T
    expected = torch.nn.functional.cross_entropy(logits + model.output_bias, batch[model.POS_ITEMS][row, column])
    weights = [part for part in model.parameters() if part.requires_grad]
    gradients = torch.autograd.grad(expected, weights)
    found = masked_loss(make_fast(model, causal=False), SequenceLoss(name="softmax"), batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weights), gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_it_is_asked_for_and_learns(settings: dict[str, Any]) -> None:
    """The next item of the tiny data is mostly the one that follows; a guess has it in its first five for half of the users."""
    assert not issubclass(trainer_class(LLMConfig("BERT4Rec", "tiny")), MaskedTraining)
    given = {**settings, "train_mode": "sequence", "epochs": 80, "stopping_step": 80, "learning_rate": 0.003}
    given |= {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "train_batch_size": 64}
    assert issubclass(trainer_class(LLMConfig("BERT4Rec", "tiny", config_dict=given)), MaskedTraining)
    result = run_recbole_llm("BERT4Rec", "tiny", config_dict=given)
    assert result["test_result"]["hit@5"] > 0.6
