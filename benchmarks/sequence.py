"""One epoch of ``train_mode: sequence`` against RecBole's own, on ml-100k, with the same model and settings, in one process.

    python benchmarks/sequence.py [--model SASRec] [--batches 4] [--rounds 3] [--full]

Prints JSON lines. RecBole's epoch is timed on ``--batches`` of its batches and scaled to all of them; the two are
measured alternately, ``--rounds`` times, and the ratio is that of the medians. Importing RecBole's ``sine.py`` turns on
autograd's anomaly detection for the whole process, so there are two ratios: against RecBole as shipped, and without it.
``--full`` also trains a whole prefix epoch (minutes) and compares validation NDCG@10 after one epoch of each, and after
the same time. On a busy machine, use ``--clock cpu`` and one thread.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time

import torch

import recbole_llm  # noqa: F401  (shims)
from recbole_llm import compat
from recbole_llm.classical.sequence import SequenceTraining

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Few:
    """The first batches of a loader."""

    def __init__(self, loader, number):
        self.loader, self.number = loader, number

    def __iter__(self):
        return itertools.islice(iter(self.loader), self.number)


def build(model_name, folder):
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
    }
    compat.apply()
    config = Config(model=model_name, dataset="ml-100k", config_dict=settings)
    init_seed(config["seed"], True)
    train, valid, _ = data_preparation(config, SequentialDataset(config))
    return config, train, valid, get_model(model_name)(config, train.dataset).to(config["device"])


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SASRec")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole's Config reads it
    with tempfile.TemporaryDirectory() as folder:
        config, train, valid, model = build(options.model, folder)
        result = speed(options.clock, trainers(config, model), train, options.batches, options.rounds)
        print(json.dumps({"benchmark": "sequence epoch", "model": options.model, **result}), flush=True)
        if options.full:
            result = quality(options.clock, trainers(config, model), train, valid)
            print(json.dumps({"benchmark": "sequence quality", "model": options.model, **result}), flush=True)


if __name__ == "__main__":
    main()
