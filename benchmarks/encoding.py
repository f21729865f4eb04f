"""The cost of encoding a catalogue with Laser and of ranking it for users: ``python benchmarks/encoding.py``.

A random Llama between random towers, with the settings of the builtin LM, encodes synthetic catalogues of N, 4N and 16N items.
Titles have 3 to 64 words; short ones are more frequent. All weights are random, which does not affect the cost. One JSON line
per comparison. Sides are timed alternately and medians are compared.
On a busy machine use one thread and processor time: ``OMP_NUM_THREADS=1 python benchmarks/encoding.py --clock cpu``.

    linear   seconds of ``encode_items`` for N and 4N items
    memory   growth of the resident size to its peak during ``encode_items``, without the item matrix that it returns; for N,
             4N and 16N items, each in a process of its own (Linux). The model, the tokenised titles and the buffers of
             libraries are allocated before and are not included. Everything else is, such as lists or a second copy of the
             matrix: malloc returns freed memory to the system at once, and batches are small, so that they do not hide
             growth with the catalogue
    sorted   batches of similar length, as in the package, against batches in the order of the catalogue with the same token
             budget; the share of real tokens in both, and the largest difference of the two matrices
    rank     users per second of ``full_sort_predict``, for the same users and titles in catalogues of N and 4N items;
             times_anew: ranking N items for one user, with the catalogue encoded for it, against a cached matrix
"""

import argparse
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allmrec import WORDS, Untrained, write_dataset  # noqa: E402
from scoring import CLOCKS, report, resident, seconds  # noqa: E402

from recbole_llm.llm.packing import token_batches  # noqa: E402

WIDTH, LAYERS, TITLE, HISTORY = 256, 2, (3, 64), 10  # words of a title, items of a history
PROBE_TOKENS = 256  # of a batch, where memory is measured
BATCHES = "recbole_llm.model.towers.token_batches"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # as glibc reads them


def assemble(folder: Path, items: int, **settings):
    """A Laser as in a run, in an empty folder. A catalogue begins with the titles of every smaller one."""
    from recbole_llm import quick_start
    from recbole_llm.config import LLMConfig

    _write_lm(folder / "lm")
    write_dataset(folder / "words", *_draw(items))
    settings |= {"data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "llm_path": str(folder / "lm")}
    config = LLMConfig("Laser", "words", config_dict={**settings, "llm": "builtin", "use_gpu": False, "show_progress": False})
    model = quick_start.assemble(config).model
    model.reader = model._reader(Untrained.of(model, folder / "results"))
    torch.manual_seed(0)
    model.towers = model.reader.towers().requires_grad_(False).eval()
    return model


def _write_lm(folder: Path) -> None:
    """A token for each word; everything else in a prompt is an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 704, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=1024, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def _draw(items: int) -> tuple[list[str], list[list[int]]]:
    """Titles of random length, and histories of ten successive items, in which every item occurs."""
    draw = random.Random(0)
    least, most = TITLE
    titles = [" ".join(draw.choices(WORDS, k=int(least * ((most + 1) / least) ** draw.random()))) for _ in range(items)]
    return titles, [[(start + step) % items for step in range(HISTORY)] for start in range(0, items, HISTORY // 2)]


def linear(models: dict[int, object], *timing) -> None:
    taken = list(seconds({size: model.encode_items for size, model in models.items()}, *timing).values())
    report(
        "linear",
        items=list(models),
        items_per_s=[round(size / took) for size, took in zip(models, taken, strict=True)],
        seconds_relative=[round(took / taken[0], 2) for took in taken],
    )


def memory(sizes: Sequence[int]) -> None:
    extra, matrices = [], []
    for size in sizes:
        command = [sys.executable, __file__, "--memory-probe", str(size)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **MALLOC}).stdout
        grown, matrix = json.loads(found.splitlines()[-1])
        extra.append((grown - matrix) / 2**20)
        matrices.append(matrix / 2**20)
    report(
        "memory",
        items=sizes,
        batch_tokens=PROBE_TOKENS,
        matrix_mib=[round(mib, 2) for mib in matrices],
        extra_mib=[round(mib, 2) for mib in extra],
        extra_relative=[round(mib / extra[0], 3) for mib in extra],
    )


def memory_of(model) -> tuple[int, int]:
    """Bytes by which the resident size rises at its peak while the catalogue is encoded, and those of the matrix."""
    model.encode_histories(histories_of(model, 200))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    matrix = model.encode_items()
    return resident() - before, matrix.nbytes


def histories_of(model, users: int) -> list[list[int]]:
    """Histories with the same titles in every catalogue of at least ``users`` + ten items."""
    _, *tokens = model.parts.histories.item_ids  # without the padding item
    number = {token: item for item, token in enumerate(tokens, 1)}
    return [[number[str((user + step) % len(tokens))] for step in range(HISTORY)] for user in range(users)]


def sorting(model, *timing) -> None:
    matrices: dict[str, torch.Tensor] = {}
    seen: dict[str, list[list[int]]] = {}
    lengths: list[int] = []

    def encode(name: str, batched) -> None:
        def noted(found: Sequence[int], *rest) -> list[list[int]]:
            lengths[:], seen[name] = found, batched(found, *rest)
            return seen[name]

        with mock.patch(BATCHES, noted):
            matrices[name] = model.encode_items()

    sides = {"sorted": token_batches, "unsorted": in_order}
    taken = seconds({name: partial(encode, name, batched) for name, batched in sides.items()}, *timing)
    padded = {name: sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) for name, batches in seen.items()}
    report(
        "sorted",
        items=len(lengths),
        times_unsorted=taken["unsorted"] / taken["sorted"],
        batches={name: len(batches) for name, batches in seen.items()},
        real_tokens={name: round(sum(lengths) / size, 3) for name, size in padded.items()},
        max_diff=float((matrices["sorted"] - matrices["unsorted"]).abs().max()),
    )


def in_order(lengths: Sequence[int], _: Sequence[int], budget: int) -> list[list[int]]:
    """Batches of successive items, as many as fit into ``budget`` with their padding."""
    batches: list[list[int]] = [[]]
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if batches[-1] and (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = length
        batches[-1].append(i)
    return batches


def ranking(models: dict[int, object], users: int, *timing) -> None:
    from recbole.data.interaction import Interaction

    def rank(model, users: int, anew: bool = False) -> None:
        histories = torch.tensor(histories_of(model, users))  # [B, L]
        if anew:
            model.item_matrix = model.encode_items()
        model.full_sort_predict(Interaction({model.ITEM_SEQ: histories, model.ITEM_SEQ_LEN: torch.full((users,), HISTORY)}))

    for model in models.values():
        model.item_matrix = model.encode_items()
    taken = list(seconds({size: partial(rank, model, users) for size, model in models.items()}, *timing).values())
    few = next(iter(models.values()))
    both = seconds({"cached": partial(rank, few, 1), "anew": partial(rank, few, 1, anew=True)}, *timing)
    report(
        "rank",
        items=list(models),
        users=users,
        users_per_s=[round(users / took, 1) for took in taken],
        seconds_relative=[round(took / taken[0], 3) for took in taken],
        times_anew=both["anew"] / both["cached"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=500, help="N")
    parser.add_argument("--users", type=int, default=64, help="users per call of full_sort_predict")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per comparison")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--memory-probe", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole's Config reads it
    warnings.simplefilter("ignore")
    few = options.items
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_probe:
            print(json.dumps(memory_of(assemble(Path(folder), options.memory_probe, score_batch_tokens=PROBE_TOKENS))))
            return
        models = {size: assemble(Path(folder, str(size)), size) for size in (few, 4 * few)}
    model, timing = models[few], (options.rounds, CLOCKS[options.clock])
    report(
        "setting",
        parameters=sum(p.numel() for p in model.reader.causal.model.parameters()),
        width=WIDTH,
        batch_tokens=model.reader._batch_tokens,
        clock=options.clock,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    linear(models, *timing)
    memory([few, 4 * few, 16 * few])
    sorting(model, *timing)
    ranking(models, options.users, *timing)


if __name__ == "__main__":
    main()
