"""One epoch of ``train_mode: sequence`` against RecBole's own and RecTools', with the same model, data and threads.

    python benchmarks/sequence.py [--model SASRec] [--dataset ml-100k] [--loss softmax] [--batches 4] [--rounds 3] [--full]
        [--rectools-python PYTHON] [--threads 1] [--clock cpu] [--KEY VALUE of the model]

Prints JSON lines. RecBole's epoch is timed on ``--batches`` of its batches and scaled to all of them; the two are
measured alternately, ``--rounds`` times, and the ratio is that of the medians. Importing RecBole's ``sine.py`` turns on
autograd's anomaly detection for the whole process, so there are two ratios: against RecBole as shipped, and without it.
``--full`` also trains a whole prefix epoch (minutes) and compares validation NDCG@10 after one epoch of each, and after
the same time. On a busy machine, use ``--clock cpu`` and one thread.

``--rectools-python`` is an interpreter with RecTools: its SASRec, with the same blocks, heads, width, length and dropout, its
softmax over the whole catalogue, and as many sequences a batch, is trained on the same interactions for ``--rounds`` epochs after
a first one. RecTools keeps the last items of each user only, and its feed-forward layers have the model's width, so besides the
epoch, the seconds of a million targets are given (``--inner_size`` makes ours as wide).
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import recbole_llm  # noqa: F401  (shims)
from recbole_llm import compat
from recbole_llm.classical.sequence import SequenceTraining
from recbole_llm.classical.windows import training_histories

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


OF_MODEL = {
    **{"data_path": str, "n_layers": int, "n_heads": int, "hidden_size": int, "inner_size": int, "MAX_ITEM_LIST_LENGTH": int},
    **{"hidden_dropout_prob": float, "attn_dropout_prob": float, "train_batch_size": int},
}
"""Keys that are options, too."""


class Few:
    """The first batches of a loader."""

    def __init__(self, loader, number):
        self.loader, self.number = loader, number

    def __iter__(self):
        return itertools.islice(iter(self.loader), self.number)


def build(options, folder):
    from recbole.config import Config
    from recbole.data import data_preparation
    from recbole.data.dataset import SequentialDataset
    from recbole.utils import get_model, init_seed

    settings = {
        "checkpoint_dir": folder,
        "show_progress": False,
        "train_neg_sample_args": None,
        "metric_decimal_place": 8,
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "sequence_loss": options.loss,
    }
    settings |= {key: value for key in OF_MODEL if (value := getattr(options, key)) is not None}
    compat.apply()
    config = Config(model=options.model, dataset=options.dataset, config_dict=settings)
    init_seed(config["seed"], True)
    train, valid, _ = data_preparation(config, SequentialDataset(config))
    return config, train, valid, get_model(options.model)(config, train.dataset).to(config["device"])


def trainers(config, model):
    """RecBole's trainer and ours, each with its own copy of the same fresh model."""
    from recbole.trainer import Trainer

    return Trainer(config, copy.deepcopy(model)), type("T", (SequenceTraining, Trainer), {})(config, copy.deepcopy(model))


def seconds(clock, trainer, data, epoch, anomaly=False):
    """Seconds of one epoch over ``data``."""
    with torch.autograd.set_detect_anomaly(anomaly, check_nan=True):
        start = CLOCKS[clock]()
        trainer._train_epoch(data, epoch)
        return CLOCKS[clock]() - start


def speed(clock, pair, train, batches, rounds):
    prefix, sequence = pair
    few, share = Few(train, batches), batches / len(train)
    seconds(clock, prefix, Few(train, 1), 0)
    seconds(clock, sequence, train, 0)  # builds its windows once
    times: dict[str, list[float]] = {"prefix_as_shipped": [], "prefix": [], "sequence": []}
    for epoch in range(rounds):
        times["prefix_as_shipped"].append(seconds(clock, prefix, few, epoch, anomaly=True) / share)
        times["prefix"].append(seconds(clock, prefix, few, epoch) / share)
        times["sequence"].append(seconds(clock, sequence, train, epoch))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "epoch_seconds": {name: round(value, 2) for name, value in median.items()},
        "ratio": round(median["prefix"] / median["sequence"], 1),
        "ratio_as_shipped": round(median["prefix_as_shipped"] / median["sequence"], 1),
        "share_of_prefix_batches": f"{batches} of {len(train)}",
        "clock": clock,
        "threads": torch.get_num_threads(),
    }


def quality(clock, pair, train, valid):
    """Validation NDCG@10 after one prefix epoch, one sequence epoch, and sequence epochs for the time of the prefix epoch."""
    prefix, sequence = pair
    for trainer in pair:
        trainer.eval_collector.data_collect(train)
    budget = seconds(clock, prefix, train, 0)
    score = {"prefix_1_epoch": prefix.evaluate(valid, load_best_model=False)["ndcg@10"]}
    spent, epochs, best = 0.0, 0, 0.0
    while spent < budget:
        spent += seconds(clock, sequence, train, epochs)
        epochs += 1
        reached = sequence.evaluate(valid, load_best_model=False)["ndcg@10"]
        score.setdefault("sequence_1_epoch", reached)
        best = max(best, reached)
    score = {name: round(float(value), 4) for name, value in {**score, "sequence_same_time": best}.items()}
    return {"valid_ndcg@10": score, "prefix_seconds": round(budget, 1), "sequence_epochs": epochs}


def rectools(options, config, loader, histories, folder):
    """RecTools' seconds of an epoch and of a million targets, measured by its own interpreter."""
    file = Path(folder) / "interactions.csv"
    lines = [f"{user},{item},{place}" for user, row in enumerate(histories) for place, item in enumerate(row.tolist())]
    file.write_text("\n".join(["user_id,item_id,datetime", *lines]) + "\n")
    settings = {
        **{"n_blocks": config["n_layers"], "n_heads": config["n_heads"], "n_factors": config["hidden_size"]},
        **{"session_max_len": config["MAX_ITEM_LIST_LENGTH"], "dropout_rate": config["hidden_dropout_prob"]},
        **{"batch_size": loader.batch_size, "lr": config["learning_rate"], "loss": "softmax"},
    }
    job = {"file": str(file), "settings": settings, "rounds": options.rounds, "clock": options.clock, "threads": options.threads}
    script = Path(__file__).with_name("sequence_rectools.py")
    number = str(options.threads)
    threads = {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}
    command = [options.rectools_python, str(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **threads})
    if done.returncode:
        sys.exit(f"{options.rectools_python} {script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(options, config, sequence, train, folder):
    """Ours against RecTools: medians of ``--rounds`` epochs after a first one."""
    seconds(options.clock, sequence, train, 0)
    ours = statistics.median(seconds(options.clock, sequence, train, epoch + 1) for epoch in range(options.rounds))
    loader = sequence._batches[0]
    targets = int((loader.data.targets != 0).sum())
    theirs = rectools(options, config, loader, training_histories(train.dataset), folder)
    million = ours / targets * 1e6, theirs["epoch_seconds"] / theirs["targets"] * 1e6
    return {
        "loss": options.loss,
        "sequence": {"epoch_seconds": round(ours, 2), "targets": targets, "seconds_per_million": round(million[0], 2)},
        "rectools": {**theirs, "seconds_per_million": round(million[1], 2)},
        "ratio_epoch": round(theirs["epoch_seconds"] / ours, 2),
        "ratio_per_target": round(million[1] / million[0], 2),
        "batch_sequences": loader.batch_size,
        "clock": options.clock,
        "threads": torch.get_num_threads(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SASRec")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--loss", choices=("recbole", "softmax", "sampled_softmax", "gbce"), default="recbole")
    parser.add_argument("--batches", type=int, default=4, help="of RecBole's own epoch; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rectools-python")
    parser.add_argument("--full", action="store_true")
    for key, kind in OF_MODEL.items():
        parser.add_argument(f"--{key}", type=kind)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole's Config reads it
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config, train, valid, model = build(options, folder)
        about = {"model": options.model, "dataset": options.dataset}
        if options.batches:
            result = speed(options.clock, trainers(config, model), train, options.batches, options.rounds)
            print(json.dumps({"benchmark": "sequence epoch", **about, **result}), flush=True)
        if options.rectools_python:
            result = compared(options, config, trainers(config, model)[1], train, folder)
            print(json.dumps({"benchmark": "sequence against RecTools", **about, **result}), flush=True)
        if options.full:
            result = quality(options.clock, trainers(config, model), train, valid)
            print(json.dumps({"benchmark": "sequence quality", **about, **result}), flush=True)


if __name__ == "__main__":
    main()
