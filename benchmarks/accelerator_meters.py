"""The machine, the language models and the meters of ``accelerator.py``."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from allmrec import WORDS

from recbole_llm.compat import peak_memory_bytes
from recbole_llm.llm.causal_lm import CausalLM, load_tokenizer, resolved_dtype
from recbole_llm.training.loop import TrainingLoop

TITLE = 7  # words of a title, one token each
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **{"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "qwen2-7b": {
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    },
    "tiny": {
        **{"vocab_size": 700, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
}
CF = {"epochs": 1, "train_batch_size": 256, "hidden_size": 32, "inner_size": 64, "n_heads": 2}
COMMON: dict[str, Any] = {
    **{
        "show_progress": False,
        "cf_config": CF,
        "cheap_config": CF,
        "retriever_config": CF,
        "domain_field": "genre",
        "domain_min_users": 5,
    },
    **{"domain_max_views": 1, "epochs": 1, "lora_epochs": 1, "stage1_epochs": 1, "stage2_epochs": 1, "phase1_epochs": 1},
    **{"phase2_epochs": 1, "prompt": "listwise", "lora_train_mode": "prefix", "scorer": "tree", "max_history": 20},
    **{"max_prompt_tokens": 1024, "stage1_batch_size": 32, "tune_text_encoder": False, "valid_metric": "NDCG@5", "topk": [1, 5]},
    **{"metrics": ["Hit", "NDCG"], "eval_args": {"mode": "candidates"}, "merge_points": 3, "merge_steps": 2},
}

TINY = {"max_history": 3, "candidates": {"num_negatives": 4}, "merge_points": 2, "merge_steps": 1}  # without an accelerator
TINY_FORMER = {"m_former_hidden_size": 16, "m_former_num_layers": 2, "m_former_num_heads": 2}


# -- models and data ---------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, users: int, items: int) -> None:
    """The atomic files of a dataset "words" with two categories."""
    draw, count = random.Random(0), items
    texts = [f"{item}\t{' '.join(draw.choices(WORDS, k=TITLE))}\t{'odd' if item % 2 else 'even'} all\n" for item in range(count)]
    rows = [
        f"{user}\t{item}\t{when}\n"
        for user in range(users)
        for when, item in enumerate(draw.sample(range(count), draw.randint(count // 16, count // 10)))
    ]
    folder.mkdir(parents=True)
    (folder / "words.item").write_text("".join(["item_id:token\ttitle:token_seq\tgenre:token_seq\n", *texts]))
    (folder / "words.inter").write_text("".join(["user_id:token\titem_id:token\ttimestamp:float\n", *rows]))


def write_lm(folder: Path, shape: dict[str, Any]) -> None:
    """A config, a tokenizer with a token for each word, and an empty file of weights: they are made on the device."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    names = ["<pad>", "</s>", "<unk>", "\n", *letters, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    # a Llama: transformers gives a Qwen2 its own tokenizer
    LlamaConfig(max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")


def random_lm(
    folder: Path, *, device: Any = None, dtype: Any = "auto", attn_implementation: str | None = None, **_: Any
) -> CausalLM:
    """Stands in for ``load_causal_lm``: random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device(device or "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        options = {"dtype": resolved_dtype(dtype, device), "attn_implementation": attn_implementation}
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    return CausalLM(model.to(device).requires_grad_(False).eval(), load_tokenizer(folder))


# -- meters ------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The machine, and the scratch folder of a part."""

    device: torch.device
    folder: Path
    peak: float | None = None  # operations a second
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Users and items."""
        return (16, 80) if self.tiny else (300, 400)

    @property
    def tiny(self) -> bool:
        """Whether there is no accelerator, so that parts only show that they run."""
        return self.device.type == "cpu"

    def wait(self) -> None:
        """Wait for what the device has been given."""
        if not self.tiny:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Free memory and forget its peak."""
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float:
        """The peak of the device's memory since :meth:`clear`; on a CPU that of the process since its start."""
        return (peak_memory_bytes() if self.tiny else torch.cuda.max_memory_allocated(self.device)) / 2**30

    def share(self, operations: float, seconds: float) -> float | None:
        """Share of the card's peak."""
        return operations / seconds / self.peak if self.peak else None

    def assemble(self, model: str, shape: str, **settings: Any) -> Any:
        """A run on the LM of a shape, in bfloat16, as ``run_recbole_llm`` assembles it; nothing is trained."""
        from recbole_llm import logs
        from recbole_llm.config import LLMConfig
        from recbole_llm.quick_start import assemble

        root = self.folder / f"{model}-{shape}-{len(list(self.folder.iterdir()))}"
        write_dataset(root / "words", *self.size)
        given = {
            **COMMON,
            **(TINY if self.tiny else {}),
            "data_path": str(root),
            "checkpoint_dir": str(root / "saved"),
            "use_gpu": not self.tiny,
        }
        if shape == "smollm2-135m":
            given["llm"] = shape
        else:
            write_lm(root / "lm", SHAPES["tiny" if self.tiny else shape])
            given["llm_path"] = str(root / "lm")
        config = LLMConfig(model, "words", config_dict={**given, "dtype": "float32" if self.tiny else "bfloat16", **settings})
        logs.init_logging(config)
        return assemble(config)


class Steps:
    """Seconds and real tokens of each optimiser step, by training loop; the first step of a loop is left out."""

    def __init__(self, bench: Bench):
        self._bench, self.by_loop = bench, {}

    @contextmanager
    def counted(self, lm: Any) -> Iterator[None]:
        """Measure the loops that run in this context with this LM; they do not validate."""
        step, counter, steps = TrainingLoop._step, Tokens(lm), self

        def timed(loop: TrainingLoop) -> Any:
            steps._bench.wait()
            before, began = counter.real, time.monotonic()
            found = step(loop)
            steps._bench.wait()
            steps.by_loop.setdefault(loop.name, []).append((time.monotonic() - began, counter.real - before))
            return found

        with mock.patch.object(TrainingLoop, "_step", timed), mock.patch.object(TrainingLoop, "_validate"), counter:
            yield

    def report(self, parameters: int, bench: Bench) -> dict[str, dict[str, Any]]:
        """Steps and tokens a second, and the share of the peak, by loop."""
        found = {}
        for name, steps in self.by_loop.items():
            measured = steps[1:] or steps
            seconds, tokens = map(sum, zip(*measured, strict=True))
            found[name] = {"steps_per_s": len(measured) / seconds}
            if tokens:
                found[name] |= {"tokens_per_s": tokens / seconds, "share": bench.share(4 * parameters * tokens, seconds)}
        return found


class Tokens:
    """Counts the real tokens that an LM is given, in a ``with`` block."""

    def __init__(self, lm: Any):
        self._lm, self.real = lm.base_model, 0

    def __enter__(self) -> Tokens:
        def note(_: Any, positional: Any, named: dict[str, Any]) -> None:
            given = (
                named.get("inputs_embeds") if named.get("inputs_embeds") is not None else named.get("input_ids", *positional[:1])
            )
            rows, length = given.shape[:2]
            mask = named.get("attention_mask")
            self.real += int(mask[:, -length:].sum()) if mask is not None and mask.dim() == 2 else rows * length

        self._hook = self._lm.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def weights_of(lm: Any) -> int:
    """Weights that every token is multiplied with: all but embeddings, ``lm_head`` and adapters."""
    skipped = {id(module.weight) for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module is not None}
    return sum(p.numel() for name, p in lm.named_parameters() if id(p) not in skipped and "lora_" not in name)
