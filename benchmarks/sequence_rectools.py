"""Epochs of RecTools' SASRec for ``benchmarks/sequence.py``, in an environment with RecTools (``pip install "rectools[torch]"``).

    python benchmarks/sequence_rectools.py '{"file": ..., "settings": {...}, "rounds": 3, "clock": "wall", "threads": 1}'

The last line of the output is JSON: median seconds of an epoch after the first, and its targets.
"""

import json
import statistics
import sys
import time

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools.dataset import Dataset
from rectools.models import SASRecModel

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Epochs(Callback):
    """Seconds and targets of each epoch."""

    def __init__(self, clock):
        self.clock, self.began, self.seconds, self.targets = CLOCKS[clock], 0.0, [], 0

    def on_train_epoch_start(self, *_):
        self.began, self.targets = self.clock(), 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.targets += int((batch["y"] != 0).sum())

    def on_train_epoch_end(self, *_):
        self.seconds.append(self.clock() - self.began)


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    epochs = Epochs(job["clock"])
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    number = job["rounds"] + 1

    def trainer():
        return Trainer(max_epochs=number, min_epochs=number, devices=1, accelerator="cpu", callbacks=[epochs], **options)

    rows = pd.read_csv(job["file"])
    rows["datetime"], rows["weight"] = pd.to_datetime(rows["datetime"], unit="s"), 1.0
    model = SASRecModel(**job["settings"], get_trainer_func=trainer)
    model.fit(Dataset.construct(rows))
    measured = [callback for callback in model.fit_trainer.callbacks if isinstance(callback, Epochs)][0]
    result = {"epoch_seconds": round(statistics.median(measured.seconds[1:]), 2), "targets": measured.targets}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
