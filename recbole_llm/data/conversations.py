"""Prompts and answers as text, in the layouts that trainers of chat models read.

An example is a list of token ids whose titles are tokenised one by one. Its text is decoded from these ids.
:class:`Conversations` compares the ids with those that a trainer gets from the text, which it renders through the chat template
or, for prompts without chat, tokenises unchanged. The two may differ: a title may contain a special token or be cut within a
letter, or a token may cross the border of two parts. The line then says ``exact: false``.

Layouts: ``messages`` (OpenAI's; LLaMA-Factory reads it as ``sharegpt``) and ``alpaca``. A prompt without chat is one user message
that is rendered unchanged (LLaMA-Factory's template ``empty``); its answer includes its own end. A whole history in which
every title is a target is a document, ``{"text": ...}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recbole_llm.data.chat_templates import render
from recbole_llm.data.templates import PromptSettings
from recbole_llm.data.tokens import TextTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = ("messages", "alpaca")
_CONTENT = "RecBoleContent"  # stands for the user's text while the chat template is taken apart


@dataclass(frozen=True)
class Conversation:
    """One prompt with its answer as text.

    Attributes:
        exact: whether tokenising the text gives the ids of the example.
    """

    system: str | None
    prompt: str
    answer: str
    exact: bool

    def line(self, layout: str, *, answered: bool = True) -> dict[str, Any]:
        """The JSON object of a layout, without the answer unless ``answered``."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        if layout == "messages":
            answer = [{"role": "assistant", "content": self.answer}] if answered else []
            return {"messages": [*system, {"role": "user", "content": self.prompt}, *answer], "exact": self.exact}
        found = {"instruction": self.prompt, "input": "", "system": self.system or ""}
        return found | ({"output": self.answer} if answered else {}) | {"exact": self.exact}


class Conversations:
    """Makes texts of token ids for one tokenizer and one prompt format.

    Raises:
        ValueError: chat without a chat template, or one that does not contain the user's text as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings):
        self._tokenizer, self._settings = tokenizer, settings
        self._tokens = TextTokens(tokenizer, [], 1)
        self._begin, self._end = "", ""  # what the chat template puts around the user's text
        if settings.chat:
            parts = self._tokens.chat(_CONTENT, settings.system).split(_CONTENT)
            if len(parts) != 2:
                raise ValueError("chat: the tokenizer's chat template does not show the user's text once and unchanged")
            self._begin, self._end = parts

    def of(self, prompt: Sequence[int], answer: Sequence[int] = ()) -> Conversation:
        """The text of a prompt and its answer, both as token ids."""
        return self._chat(prompt, answer) if self._settings.chat else self._bare(prompt, answer)

    def document(self, row: Sequence[int]) -> tuple[str, bool]:
        """The text of a whole row of ids, and whether tokenising it gives them."""
        text = self._decode(row)
        return text, self._encode(text) == list(row)

    def _bare(self, prompt: Sequence[int], answer: Sequence[int]) -> Conversation:
        (text, exact), (answered, exact_too) = self.document(prompt), self.document(answer)
        return Conversation(None, text, answered, exact and exact_too)

    def _chat(self, prompt: Sequence[int], answer: Sequence[int]) -> Conversation:
        ends = bool(answer) and answer[-1] == self._tokenizer.eos_token_id  # the chat template adds an end of its own
        rendered = self._decode(self._without_bos(prompt))
        if not rendered.startswith(self._begin) or not rendered.endswith(self._end):
            raise ValueError("chat: the tokenizer does not decode what its chat template renders")
        user = rendered[len(self._begin) : len(rendered) - len(self._end)]
        answered = self._decode(answer[:-1] if ends else answer)
        again = self._tokens.chat(user, self._settings.system)
        whole = again + answered + (str(self._tokenizer.eos_token) if ends else "")
        exact = self._encode(whole) == [*self._without_bos(prompt), *answer] and self._agrees(user, again, answered)
        return Conversation(self._settings.system, user, answered, exact)

    def _agrees(self, user: str, rendered: str, answer: str) -> bool:
        """Whether the template of others, who let it read the clock, renders the same prompt, and an answer right after it."""
        messages = [{"role": "system", "content": self._settings.system}] if self._settings.system else []
        messages.append({"role": "user", "content": user})
        if not answer:
            # as docs/export.md says
            return render(self._tokenizer, messages, dated=False, add_generation_prompt=True, enable_thinking=False) == rendered
        messages.append({"role": "assistant", "content": answer})
        return render(self._tokenizer, messages, dated=False).startswith(rendered + answer)

    def _without_bos(self, prompt: Sequence[int]) -> list[int]:
        """The prompt without a BOS that the tokenizer adds before the text of the chat template."""
        bos = self._tokenizer.bos_token
        added = bos is not None and prompt[:1] == [self._tokenizer.bos_token_id] and not self._begin.startswith(str(bos))
        return list(prompt[1:] if added else prompt)

    def _decode(self, row: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> list[int]:
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": False}  # as trainers do
        return list(self._tokenizer(text, **options, verbose=False)["input_ids"]) if text else []


def description(file: str, layout: str) -> dict[str, Any]:
    """The entry of a file in LLaMA-Factory's ``dataset_info.json``; layout ``text`` is that of documents."""
    if layout == "text":
        return {"file_name": file, "columns": {"prompt": "text"}}
    if layout == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
        return {"file_name": file, "formatting": "alpaca", "columns": columns}
    roles = {"role_tag": "role", "content_tag": "content"}
    roles |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    return {"file_name": file, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": roles}
