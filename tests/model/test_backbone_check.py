"""Models on LMs of other kinds: run by what is exact for them, or refused before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.exactness import NotExactError
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.parts import histories_of
from tests.llm import families


@pytest.fixture
def lm_of(tmp_path: Path, tiny_lm: Path) -> Callable[..., str]:
    """``lm_of(family, **changes)``: the folder of a tiny LM of a family, with the tokenizer of ``tiny_lm``."""

    def save(family: str, **changes: Any) -> str:
        folder = tmp_path / family
        tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
        families.build(family, **{"vocab_size": len(tokenizer)} | changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def trained_folders(run: Any) -> list[Path]:
    return [*run.trainer.cache.root.glob("*")] if run.trainer.cache.root.exists() else []


@pytest.mark.parametrize(
    ("model", "family", "changes", "message"),
    [
        ("TALLRec", "bert", {}, "model_type bert.*not causal"),
        ("Laser", "roberta", {}, "model_type roberta.*not causal"),
        ("LoRACocktail", "llama", {"vocab_size": 300}, "tokenizer of llama has 3.. tokens, but the LM embeds 300"),
        ("TALLRec", "gpt2", {"n_positions": 40}, "max_prompt_tokens.*context of gpt2, 40; lower max_prompt_tokens by"),
        ("Laser", "llama", {"max_position_embeddings": 60}, "max_prompt_tokens.*context of llama, 60"),
    ],
)
def test_what_would_be_wrong_is_refused_before_anything_is_trained(
    settings: Any, assemble: Any, lm_of: Any, model: str, family: str, changes: dict[str, Any], message: str
) -> None:
    run = assemble(model, settings, llm_path=lm_of(family, **changes))
    with pytest.raises(ValueError, match=message) as raised:
        run.trainer.fit(run.train, run.valid)
    assert isinstance(raised.value, NotExactError) == ("max_prompt_tokens" not in message)
    assert not trained_folders(run)


def test_an_answer_that_merging_decodes_has_to_fit_too(settings: Any, assemble: Any, lm_of: Any) -> None:
    """The prompts and the titles fit into the context, nine decoded titles do not."""
    path = lm_of("llama", max_position_embeddings=256)
    for titles, fits in ((1, True), (9, False)):
        changes = {"merge_titles": titles, "max_title_tokens": 32, "max_prompt_tokens": 128}
        run = assemble("LoRACocktail", settings, llm_path=path, domain_max_views=1, **changes)
        if fits:
            run.trainer.check()
        else:
            with pytest.raises(ValueError, match="up to .* more than the context of llama, 256"):
                run.trainer.check()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strategy"), [("mistral", "prefix"), ("lfm2", "naive"), ("rwkv", "naive")])
def test_a_ranker_on_an_lm_with_windows_or_states_gives_the_scores_of_naive(
    settings: Any, assemble: Any, lm_of: Any, family: str, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = lm_of(family, **({} if family == "rwkv" else {"max_position_embeddings": 512}))
    run = assemble("TALLRec", settings, llm_path=path, lora_epochs=1, train_samples=8, valid_users=4, eval_users=6)
    run.trainer.fit(run.train, run.valid)
    assert f"scorer: {strategy} takes its place" in caplog.text
    batch = next(iter(run.test))[0]
    users = batch["user_id"]
    keep = run.candidates["test"].covers(users)
    batch, users = batch[keep], users[keep]
    listed = run.candidates["test"].lookup(users, batch["item_id"])  # [B, C]
    variant = next(iter(run.model.variants().values()))
    with torch.no_grad():
        found = variant.score(batch, listed)
        causal = run.model.parts.backbone.load(run.trainer.cache)
        builder = run.model.parts.builder(causal.tokenizer)
        for row, (history, items) in enumerate(zip(histories_of(run.model, batch), listed.tolist(), strict=True)):
            prompt, answers = builder.prompt(history).ids, [builder.answers[item] for item in items]
            alone = torch.cat([Scorer("naive")(causal.model, [Prompt(prompt)], [[answer]]) for answer in answers], dim=1)[
                0
            ]  # [C]
            torch.testing.assert_close(found[row], alone, atol=2e-3, rtol=0)
