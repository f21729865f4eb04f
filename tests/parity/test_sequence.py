"""One pass over windows gives the loss and the gradients of RecBole's own pass over all their prefixes."""

import importlib.resources
from types import SimpleNamespace

import pytest
import torch
import yaml

import recbole_llm  # noqa: F401  (shims)
from recbole_llm.classical.sequence import make_causal, sequence_loss, sequence_states

ITEMS, MAX_LEN = 41, 10
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0}
FLOATS = {"layer_norm_eps": 1e-12, "reg_weight": 1e-5}  # plain YAML reads RecBole's values as strings


def build(name, loss_type="CE"):
    """RecBole's model with RecBole's own property file, without a data set behind it."""
    from recbole.utils import get_model

    file = importlib.resources.files("recbole") / "properties" / "model" / f"{name}.yaml"
    general = {"MAX_ITEM_LIST_LENGTH": MAX_LEN, "NEG_PREFIX": "neg_", "LIST_SUFFIX": "_list", "device": "cpu"}
    fields = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "ITEM_LIST_LENGTH_FIELD": "item_length"}
    torch.manual_seed(0)
    config = {**yaml.safe_load(file.read_text()), **general, **fields, **NO_DROPOUT, **FLOATS, "loss_type": loss_type}
    return get_model(name)(config, SimpleNamespace(num=lambda field: ITEMS))


def batch():
    """Three windows of 10, 6 and 1 items, a target and a negative at every position."""
    torch.manual_seed(1)
    lengths = torch.tensor([MAX_LEN, 6, 1])
    real = torch.arange(MAX_LEN) < lengths[:, None]
    draw = [torch.randint(1, ITEMS, (3, MAX_LEN)) * real for _ in range(3)]
    return dict(zip(["item_id_list", "item_id", "neg_item_id"], draw, strict=True), item_length=lengths)


def prefixes(windows):
    """The batch RecBole would train on: one row per target, padded on the right."""
    rows = []
    for window, length in enumerate(windows["item_length"].tolist()):
        for end in range(1, length + 1):
            history = windows["item_id_list"][window] * (torch.arange(MAX_LEN) < end)
            target, negative = (windows[field][window, end - 1] for field in ("item_id", "neg_item_id"))
            rows.append((history, torch.tensor(end), target, negative))
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return dict(zip(["item_id_list", "item_length", "item_id", "neg_item_id"], columns, strict=True))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_parity(model, ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    got, expected = gradients(model, ours), gradients(model, theirs)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_loss_and_gradients_are_recboles(name, loss_type):
    model = make_causal(build(name, loss_type))
    assert_parity(model, sequence_loss(model, batch()), model.calculate_loss(prefixes(batch())))


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_nextitnet_keeps_its_regulariser(loss_type):
    """Against the untouched model: its prefixes are fed at their own length, since it reads the last column."""
    model = build("NextItNet", loss_type)
    rows = prefixes(batch())
    regulariser = model.reg_weight * model.reg_loss([model.item_embedding.weight, model.final_layer.weight])
    regulariser = regulariser + model.reg_loss_rb()
    assert regulariser > 1e-4
    losses = []
    for row, length in enumerate(rows["item_length"].tolist()):
        one = {field: column[row : row + 1] for field, column in rows.items()}
        one["item_id_list"] = one["item_id_list"][:, :length]
        losses.append(model.calculate_loss(one) - regulariser)
    theirs = torch.stack(losses).mean() + regulariser
    model = make_causal(model)
    assert_parity(model, sequence_loss(model, batch()), theirs)


def test_nextitnet_reads_the_last_item_not_the_padding():
    model = make_causal(build("NextItNet").eval())
    rows = prefixes(batch())
    scores = model.full_sort_predict(rows)
    for row, length in enumerate(rows["item_length"].tolist()):
        unpadded = build("NextItNet").eval().full_sort_predict({"item_id_list": rows["item_id_list"][row : row + 1, :length]})
        torch.testing.assert_close(scores[row : row + 1], unpadded)


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "NextItNet"])
def test_every_position_has_the_loss_of_its_prefix(name):
    model = make_causal(build(name))
    windows, rows = batch(), prefixes(batch())
    states = sequence_states(model, windows["item_id_list"], windows["item_length"])[windows["item_id"] != 0]
    logits = states @ model.item_embedding.weight.T
    ours = torch.nn.functional.cross_entropy(logits, rows["item_id"], reduction="none")
    theirs = torch.nn.functional.cross_entropy(model.full_sort_predict(rows), rows["item_id"], reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
