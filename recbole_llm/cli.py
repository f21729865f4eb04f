"""The command line of ``run_recbole_llm.py``; nothing heavy is imported before the arguments are read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from recbole_llm.registry import MODELS

_EPILOG = """any other --key=value sets a key of RecBole or of properties/*.yaml, for instance:
  --config_files="a.yaml b.yaml"          your own property files, later ones win
  --data_path=DIR                         folder that holds <dataset>/<dataset>.inter and .item
  --llm=qwen2.5-0.5b                      a backbone of properties/llm; --llm_path=FOLDER_OR_HUB_ID for another one
  --general_datasets="['amazon-toys']"    domains of the base spirit (LoRACocktail, MoLoRec)
  --source_datasets="['amazon-toys']"     source domains (WeaveRec)
  --eval_args="{'mode': 'full'}"          RecBole's full ranking instead of candidates (classical models, Laser)
  --init_from=saved/runs/RUN              another run's model on this dataset (Laser)
  --new_items=0.1                         scenarios for any model; also --cold_users, --train_users, --train_dataset
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one model on one dataset; errors that a user can mend end in one line instead of a traceback."""
    parser = argparse.ArgumentParser(
        prog="run_recbole_llm.py",
        description="Train and evaluate one model, an LLM recommender or any model of RecBole, on one dataset.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", help=f"{', '.join(MODELS)}, or a RecBole model such as SASRec")
    parser.add_argument("--dataset", "-d", help="ml-100k comes with RecBole; others are read from --data_path")
    parser.add_argument("--config_files", default="", help="property files, separated by blanks")
    known, others = parser.parse_known_args(arguments)

    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin while they wait slow whatever runs beside them, up to ten-fold on few cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from recbole_llm.quick_start import run_recbole_llm

    try:
        run_recbole_llm(known.model, known.dataset, known.config_files.split() or None, cmd_line=others)
    except (ValueError, NotImplementedError, FileNotFoundError, ConnectionError, ImportError) as error:
        if os.environ.get("RECBOLE_LLM_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(set RECBOLE_LLM_TRACEBACK=1 for the traceback)")


if __name__ == "__main__":
    main()
