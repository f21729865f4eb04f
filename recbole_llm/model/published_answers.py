"""Answers that a ranker generates to the prompts whose titles it scores, for the published protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.evaluation.published import PublishedProtocol
from recbole_llm.evaluation.recommender import Answers
from recbole_llm.llm.generation import Generator
from recbole_llm.model.parts import default_batch_tokens
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.store.files import fingerprint

if TYPE_CHECKING:
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.llm.likelihood import TitleLikelihood


@dataclass(frozen=True)
class PublishedAnswers:
    """The answers of a ranker under a published protocol.

    Args:
        longest: items of a history.
    """

    protocol: PublishedProtocol
    parts: RankerParts
    longest: int

    def generator(self, causal: CausalLM) -> Generator:
        """Decodes them."""
        tokens, penalty = self.protocol.max_new_tokens, self.protocol.repetition_penalty
        # each step reads all weights for one token of a row, so a few rows cost as much as many
        batch_tokens = self.parts.scoring.batch_tokens or max(8192, default_batch_tokens(causal))
        return Generator(causal.tokenizer, tokens, penalty, batch_tokens, padding=causal.reading.padding)

    def inputs(
        self, likelihood: TitleLikelihood, users: Sequence[int], candidates: Tensor
    ) -> tuple[Sequence[Prompt], Tensor | None]:
        """The prompts of test users (internal ids) with candidates [B, C], and the vectors of their soft slots."""
        histories = [self.parts.histories.before(user, "test")[-self.longest :].tolist() for user in users]
        return likelihood.inputs(histories, candidates, users)

    def of_row(self, generator: Generator, likelihood: TitleLikelihood, depends: Sequence[Any]) -> Answers:
        """The answers of one row of the results.

        Args:
            depends: JSON-serializable values that determine them besides prompts, histories and the generator's settings.
        """
        prompts = likelihood.prompts
        continues, settings = prompts.is_continuation, prompts.settings
        separator = settings.history_separator if continues else settings.candidate_separator
        quote = "" if self.protocol.exact else settings.title_quote  # a title is found in an answer without its quotes
        shown = [generator.decode(answer[: len(answer) - len(prompts.end)]).strip() for answer in prompts.answers]
        titles = [title.removeprefix(quote).removesuffix(quote) for title in shown]
        complete = self.protocol.completes(separator, titles, continues)

        def generate(users: Sequence[int], candidates: Tensor) -> list[str]:
            rows, soft = self.inputs(likelihood, users, candidates)
            return generator(likelihood.lm, rows, soft, complete)

        decoding = [generator.settings, generator.end_tokens(likelihood.lm), self.protocol.exact, self.protocol.depth]
        what = [self.parts.prompts_depend_on(), self.parts.histories.fingerprint, self.longest, *decoding, *depends]
        return Answers(generate, titles, separator, fingerprint(what))
