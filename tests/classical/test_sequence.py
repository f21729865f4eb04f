"""Windows, their loader and the trainer of ``train_mode: sequence``."""

import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recbole_llm  # noqa: F401  (shims)
from recbole_llm.classical.sequence import (
    CAUSAL_MODELS,
    SequenceLoader,
    SequenceTraining,
    make_causal,
    sequence_states,
)
from recbole_llm.classical.windows import Windows, training_histories, windows

MAX_LEN = 5


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(model, **config) -> config, loaders, model; 60 users of 1 to 14 interactions with 40 items."""
    rng = random.Random(0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    inter = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(60):
        inter += [f"u{user}\ti{rng.randrange(40)}\t{time}" for time in range(1 + user % 14)]
    (folder / "tiny.inter").write_text("\n".join(inter) + "\n")
    item = ["item_id:token\tclass:token"] + [f"i{item}\tc{item % 3}" for item in range(42)]
    (folder / "tiny.item").write_text("\n".join(item) + "\n")
    monkeypatch.setattr(sys, "argv", ["test"])

    def build(model, **settings):
        from recbole.config import Config
        from recbole.data import data_preparation
        from recbole.data.dataset import SequentialDataset
        from recbole.utils import get_model, init_seed

        columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
        defaults = {
            "data_path": str(tmp_path),
            "checkpoint_dir": str(tmp_path),
            "load_col": columns,
            "use_gpu": False,
            "MAX_ITEM_LIST_LENGTH": MAX_LEN,
            "train_neg_sample_args": None,
            "train_batch_size": 64,
            "epochs": 2,
            "selected_features": ["class"],
            "show_progress": False,
        }
        config = Config(model=model, dataset="tiny", config_dict={**defaults, **settings})
        init_seed(1, True)
        loaders = data_preparation(config, SequentialDataset(config))
        return config, loaders, get_model(model)(config, loaders[0].dataset).to(config["device"])

    return build


def trainer(config, model):
    from recbole.trainer import Trainer

    return type("SequenceTrainer", (SequenceTraining, Trainer), {})(config, model)


def pairs(data):
    """Every (context, target) of the windows."""
    return [
        (tuple(row[: at + 1].tolist()), target)
        for row, targets in zip(data.items, data.targets, strict=True)
        for at, target in enumerate(targets.tolist())
        if target
    ]


# windows


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_pair_exactly_once_with_a_real_context(sizes, max_len):
    starts = [1 + sum(sizes[:user]) for user in range(len(sizes))]  # every item occurs once, so a pair is known by it
    histories = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    if max(sizes) < 2:
        with pytest.raises(ValueError, match="user_inter_num_interval"):
            windows(histories, max_len)
        return
    data = windows(histories, max_len)
    assert sorted(target for _, target in pairs(data)) == [item for h in histories for item in h[1:].tolist()]
    for context, target in pairs(data):
        assert list(context) == list(range(target - len(context), target))
    assert len(data.items) == sum(-(-(size - 1) // max_len) for size in sizes if size > 1)
    assert data.lengths.tolist() == (data.items != 0).sum(1).tolist()


def test_contexts_are_as_long_as_the_cost_allows():
    by_target = {target: len(context) for context, target in pairs(windows([torch.arange(1, 13)], 5))}
    # 11 targets, 3 windows: 5 with their whole prefix, then 3 and 3 at the end of a full window
    assert [by_target[target] for target in range(2, 13)] == [1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]


# reading RecBole's training split


def test_windows_cover_recboles_training_rows_and_nothing_else(build):
    _, (train, *_), _ = build("SASRec")
    rows = train.dataset.inter_feat
    columns = (rows[field].tolist() for field in ("item_id_list", "item_length", "item_id"))
    recboles = sorted((target, tuple(row[:length])) for row, length, target in zip(*columns, strict=True))
    ours = sorted((target, context) for context, target in pairs(windows(training_histories(train.dataset), MAX_LEN)))
    assert [target for target, _ in ours] == [target for target, _ in recboles]
    # with room for everyone's history the contexts are RecBole's too
    whole = windows(training_histories(train.dataset), 20)
    assert sorted((target, context[-MAX_LEN:]) for context, target in pairs(whole)) == recboles


def test_no_validation_or_test_item_in_any_window(build, tmp_path):
    """The last two interactions of a user get items of their own, which must then be unknown to every window."""
    file = tmp_path / "tiny" / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    sizes = Counter(user for user, *_ in rows)
    for row in rows:
        left = sizes[row[0]] - int(row[2])
        if sizes[row[0]] > 3 and left <= 2:  # RecBole holds out fewer of a shorter history
            row[1] = f"i{39 + left}"
    file.write_text("\n".join([header, *map("\t".join, rows)]) + "\n")
    _, (train, valid, _), _ = build("SASRec")
    held = {train.dataset.token2id("item_id", token) for token in ("i40", "i41")}
    assert held & set(valid.dataset.inter_feat["item_id"].tolist())
    data = windows(training_histories(train.dataset), MAX_LEN)
    assert not held & set(torch.cat([data.items, data.targets]).flatten().tolist())


def test_broken_histories_are_refused(build):
    _, (train, *_), _ = build("SASRec")
    dataset = train.dataset
    dataset.inter_feat = dataset.inter_feat[torch.arange(len(dataset.inter_feat)) != 40]
    with pytest.raises(ValueError, match=r"train_mode.*user 'u\d+' are missing or out of order.*prefix"):
        training_histories(dataset)


# models


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_states_are_those_of_the_prefixes_and_never_see_a_later_item(build, name):
    _, _, model = build(name)
    make_causal(model).eval()
    items, lengths = torch.randint(1, model.n_items, (4, MAX_LEN)), torch.tensor([5, 5, 3, 1])
    items *= torch.arange(MAX_LEN) < lengths[:, None]
    states = sequence_states(model, items, lengths)
    assert states.shape[:2] == items.shape
    for at in range(MAX_LEN):
        rows = lengths > at
        prefix = {model.ITEM_SEQ: items * (torch.arange(MAX_LEN) <= at), model.ITEM_SEQ_LEN: lengths.clamp(max=at + 1)}
        scores = model.full_sort_predict(prefix)[rows]
        torch.testing.assert_close(states[rows, at] @ model.item_embedding.weight.T, scores, rtol=1e-4, atol=1e-5)
        later = items.clone()
        later[:, at + 1 :] = later[:, at + 1 :].flip(1) % (model.n_items - 1) + 1
        changed = sequence_states(model, later, torch.full_like(lengths, MAX_LEN))
        torch.testing.assert_close(changed[rows, at], states[rows, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BERT4Rec", "STAMP", "NARM"])
def test_models_that_are_not_causal_are_refused(build, name):
    config, _, model = build(name)
    with pytest.raises(ValueError, match=f"train_mode.*{name}.*SASRec.*prefix"):
        trainer(config, model)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"transform": "inverse_itemseq"}, "transform"),
        ({"loss_type": "BPR", "train_neg_sample_args": {"distribution": "popularity"}}, "train_neg_sample_args"),
    ],
)
def test_settings_that_windows_cannot_honour_are_refused(build, changes, key):
    config, _, model = build("GRU4Rec", **changes)
    with pytest.raises(ValueError, match=f"train_mode: sequence.*{key}"):
        trainer(config, model)


def test_an_unknown_loss_is_refused(build):
    _, _, model = build("GRU4Rec")
    model.loss_type = "hinge"
    with pytest.raises(ValueError, match="loss_type: 'hinge'"):
        make_causal(model)


# training


def model_stub(loss_type="CE", n_items=9):
    fields = {"ITEM_SEQ": "items", "ITEM_SEQ_LEN": "length", "POS_ITEM_ID": "target", "NEG_ITEM_ID": "negative"}
    return SimpleNamespace(**fields, loss_type=loss_type, n_items=n_items)


def test_order_depends_on_seed_and_epoch_alone():
    data = windows([torch.arange(1, 9) for _ in range(20)], 3)
    loader = SequenceLoader(data, model_stub(), pairs_per_batch=20, seed=3)

    def order(epoch):
        loader.epoch = epoch
        return [batch["items"].tolist() for batch in loader]

    first, second = order(0), order(1)
    assert first == order(0) != second
    neighbour = SequenceLoader(data, model_stub(), pairs_per_batch=20, seed=4)
    assert [batch["items"].tolist() for batch in neighbour] not in (first, second)
    assert len(loader) == len(first)
    assert sorted(row for batch in first for row in batch) == sorted(data.items.tolist())


def test_without_shuffle_the_windows_keep_their_order(build):
    config, (train, *_), model = build("SASRec", shuffle=False)
    loader, _ = SequenceTraining.batches(config, model, train)
    items = torch.cat([torch.nn.functional.pad(part := batch[model.ITEM_SEQ], (0, MAX_LEN - part.size(1))) for batch in loader])
    assert torch.equal(items, windows(training_histories(train.dataset), MAX_LEN).items)


def test_batches_count_pairs_and_are_as_wide_as_their_longest_window():
    data = windows([torch.arange(1, 4) for _ in range(10)], 6)  # two targets each
    loader = SequenceLoader(data, model_stub(), pairs_per_batch=8, seed=0)
    assert [tuple(batch["items"].shape) for batch in loader] == [(4, 2), (4, 2), (2, 2)]


def test_negatives_are_any_item_but_the_target():
    items = torch.ones(50, 8, dtype=torch.long)
    targets = torch.randint(1, 9, (50, 8), generator=torch.Generator().manual_seed(0))
    loader = SequenceLoader(Windows(items, torch.full((50,), 8), targets), model_stub("BPR"), 400, seed=0)
    (batch,) = loader
    assert not (batch["negative"] == batch["target"]).any()
    assert sorted(batch["negative"].unique().tolist()) == list(range(1, 9))


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "NextItNet"])
def test_recboles_trainer_fits_on_windows(build, name, loss_type):
    sampling = None if loss_type == "CE" else {"distribution": "uniform", "sample_num": 1}
    config, (train, valid, _), model = build(name, loss_type=loss_type, train_neg_sample_args=sampling, epochs=4)
    fitted = trainer(config, model)
    _, result = fitted.fit(train, valid, verbose=False, saved=False)
    losses = list(fitted.train_loss_dict.values())
    assert losses[-1] < losses[0]
    assert "ndcg@10" in result
    assert "forward" not in vars(model) or name == "NextItNet"
    assert "gather_indexes" not in vars(model)


def test_a_failing_step_leaves_the_model_as_it_was(build):
    from recbole_llm.classical.sequence import sequence_loss

    _, _, model = build("SASRec")
    batch = {model.ITEM_SEQ: torch.tensor([[1, 2]]), model.ITEM_SEQ_LEN: torch.tensor([2])}
    model.loss_fct = None
    with pytest.raises(TypeError):
        sequence_loss(model, {**batch, model.POS_ITEM_ID: torch.tensor([[2, 3]])})
    assert not {"forward", "gather_indexes"} & vars(model).keys()


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_skipping_padding_changes_no_loss(build, monkeypatch, loss_type):
    """Rows of similar length in one pass each, against one pass over the padded batch."""
    from recbole_llm.classical import sequence

    sampling = None if loss_type == "CE" else {"distribution": "uniform", "sample_num": 1}
    still = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    _, (train, *_), model = build("SASRec", loss_type=loss_type, train_neg_sample_args=sampling, **still)
    make_causal(model)
    data = windows(training_histories(train.dataset), MAX_LEN)
    batch = next(iter(SequenceLoader(data, model, pairs_per_batch=200, seed=0)))
    found, shapes = [], []
    states = sequence.sequence_states
    monkeypatch.setattr(
        sequence,
        "sequence_states",
        lambda model, items, lengths: shapes.append(tuple(items.shape)) or states(model, items, lengths),
    )
    for positions in (1, 30, 10**6):
        monkeypatch.setattr(sequence, "POSITIONS", positions)
        model.zero_grad()
        loss = sequence.sequence_loss(model, batch)
        loss.backward()
        found.append((loss.detach(), model.item_embedding.weight.grad.clone()))
    whole = shapes.pop()
    assert whole == tuple(batch["item_id_list"].shape)
    assert sum(rows * width for rows, width in shapes[: whole[0]]) == batch["item_length"].sum()  # one row each, no padding
    for loss, gradient in found[:2]:
        torch.testing.assert_close(loss, found[2][0])
        torch.testing.assert_close(gradient, found[2][1], rtol=1e-4, atol=1e-6)


def gradients_of(loss, weight):
    """Number of operations whose backward pass makes a gradient of ``weight``."""
    count, seen, left = 0, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        for function, _ in node.next_functions:
            if function is not None:
                count += getattr(function, "variable", None) is weight
                left += [] if function in seen else [function]
                seen.add(function)
    return count


@pytest.mark.parametrize("name", ["recbole", "softmax", "sampled_softmax", "gbce"])
def test_a_batch_makes_two_gradients_of_the_catalogue(build, monkeypatch, name):
    """One for the histories and one for the loss, however many groups a batch has: each is as large as the catalogue."""
    from recbole_llm.classical import sequence
    from recbole_llm.classical.losses import SequenceLoss

    _, (train, *_), model = build("SASRec")
    make_causal(model)
    data = windows(training_histories(train.dataset), MAX_LEN)
    batch = next(iter(SequenceLoader(data, model, pairs_per_batch=200, seed=0)))
    monkeypatch.setattr(sequence, "POSITIONS", 1)
    loss = sequence.sequence_loss(model, batch, SequenceLoss(name=name, negatives=5))
    assert gradients_of(loss, model.item_embedding.weight) == 2
