"""The cost of RecBole's trainer, predicted from a few timed steps and validations on a copy of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from recbole.trainer import (
    KGATTrainer,
    KGTrainer,
    MKRTrainer,
    NCLTrainer,
    RaCTTrainer,
    RecVAETrainer,
    S3RecTrainer,
    TraditionalTrainer,
)
from recbole.utils import EvaluatorType

from recbole_llm.evaluation.candidate_scores import CandidateScores
from recbole_llm.evaluation.ranks import candidate_rows, gather_scores
from recbole_llm.store.costs import Cost
from recbole_llm.store.trials import trial, worth_a_trial

SAMPLE, USER = 2e-5, 1e-3  # guessed seconds of a training sample and of an evaluation user
MakeCopy = Callable[[], tuple[Any, float]]
_OWN_EPOCHS = (KGATTrainer, KGTrainer, MKRTrainer, NCLTrainer, RaCTTrainer, RecVAETrainer, S3RecTrainer)
"""RecBole's trainers whose epochs are more, or other, than one step for each batch of the loader."""


def training_cost(config: Any, make_copy: MakeCopy, trainer: type[Any], train: Any, valid: Any) -> Cost:
    """The cost of RecBole's ``fit``, validations included; early stopping may end it before.

    Args:
        make_copy: makes a model as ``fit`` gets it, with any weights; returns the seconds of what goes before, too.
        trainer: the class, whose ``batches(config, model, train)`` are those of an epoch, and the loss of each.
        train, valid: RecBole's loaders.
    """
    epochs = 1 if issubclass(trainer, TraditionalTrainer) else config["epochs"]  # whatever the config, says RecBole
    samples = len(train._dataset)
    if issubclass(trainer, _OWN_EPOCHS):
        return Cost(samples=samples, note=f"RecBole's trainer of {config['model']}, not estimated")
    if not worth_a_trial(SAMPLE * samples * epochs):
        return Cost(samples=samples, note=f"RecBole's trainer, at most {epochs} epoch{'s' * (epochs > 1)}, not estimated")
    model, before = make_copy()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return Cost(samples=samples)
    model.train()  # in which SGL draws its graphs
    loader, loss = trainer.batches(config, model, train)
    optimizer = torch.optim.Adam(parameters)
    with _endless(loader) as following:

        def step() -> None:
            optimizer.zero_grad()
            found = loss(next(following).to(config["device"]))
            total: Any = sum(found) if isinstance(found, tuple) else found
            total.backward()
            optimizer.step()

        epoch = trial(step, len(loader))
    every = min(config["eval_step"], epochs)  # as in RecBole; 0: never
    number = epochs // every if valid and every else 0
    validation = _evaluation_seconds(config, model, valid) if number else 0.0
    return Cost(
        samples=samples,
        steps=epochs * len(loader),
        parameters=sum(parameter.numel() for parameter in parameters),
        seconds=before + epochs * epoch + number * validation,
        at_most=number > 0,
        note=f"RecBole's trainer, {epochs} epoch{'s' * (epochs > 1)} of {_text(epoch)} and "
        f"{number} validation{'s' * (number != 1)} of {_text(validation)}" + (", unless it stops early" if number else ""),
    )


def _text(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:,.0f} s"


def evaluation_cost(config: Any, make_copy: MakeCopy, data: Any) -> Cost:
    """The cost of an evaluation of RecBole's model."""
    candidates = getattr(data, "candidates", None)
    chosen = candidates.users if candidates else getattr(data, "users", None)  # eval_users of them
    users = data.sample_size if chosen is None else len(chosen)
    if not worth_a_trial(USER * users):
        return Cost(samples=users, note="not estimated")
    return Cost(samples=users, seconds=_evaluation_seconds(config, make_copy()[0], data) * users / data.sample_size)


def _evaluation_seconds(config: Any, model: Any, data: Any) -> float:
    def step() -> None:
        interaction = next(following)[0].to(config["device"])
        if config["eval_type"] == EvaluatorType.VALUE:  # labels of given items
            model.predict(interaction)
            return
        some = torch.ones(len(interaction), 1, dtype=torch.long, device=config["device"])  # [B, 1]
        scores = score(interaction, some)
        candidate_rows(scores, some, some[:, 0], 10)[0].topk(10)  # as for RecBole's metrics

    model.eval()
    field = config["ITEM_ID_FIELD"]
    # a full ranking costs what its scores do, at any item
    score = (
        CandidateScores(model, field) if getattr(data, "candidates", None) else partial(gather_scores, model, item_field=field)
    )
    with torch.no_grad(), _endless(data) as following:
        return trial(step, len(data))


@contextlib.contextmanager
def _endless(loader: Any) -> Iterator[Iterator[Any]]:
    """The batches of a loader again and again; afterwards its random state is as before."""
    generator = getattr(loader, "generator", None)
    state = None if generator is None else generator.get_state()
    try:
        yield chain.from_iterable(repeat(loader))
    finally:
        if generator is not None:
            generator.set_state(state)
