"""Token ids of what the models are asked and of what they shall write: prompts, gold traces, reference answers.

The policy is shown the question, the posterior the question and the hint. Prompt and trace are tokenized apart and
joined as ids, since the same trace follows two different prompts.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from megavar.config.schema import TemplateConfig
from megavar.records import Question, TokenIds


class Templates:
    """A tokenizer with the run's templates.

    Raises:
        ValueError: if the tokenizer has no chat template or no end-of-sequence token.
    """

    def __init__(self, model: Path, config: TemplateConfig) -> None:
        self.config = config
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        if self._tokenizer.chat_template is None or self._tokenizer.eos_token_id is None:
            raise ValueError(f"{model}: the tokenizer has no chat template or no eos token; add both to the folder.")
        self._control = re.compile("|".join(re.escape(token) for token in self._control_tokens()))

    def policy_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] of x."""
        return self._prompt(self.config.policy, question)

    def posterior_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] of x with the hint y'."""
        return self._prompt(self.config.posterior, question)

    def trace(self, text: str) -> TokenIds:
        """[trace tokens] of a trace's text and its close marker."""
        return self._ids(text + self.config.close_marker)

    def answer(self, question: Question) -> TokenIds:
        """[answer tokens] of the reference answer and the end of sequence."""
        text = question.solution or _fill(self.config.solution, question)
        return np.append(self._ids(text), np.int32(self._tokenizer.eos_token_id))

    @property
    def close_token(self) -> int | None:
        """The close marker's id, or None if it is several tokens."""
        ids = self._ids(self.config.close_marker)
        return int(ids[0]) if len(ids) == 1 else None

    def decode(self, ids: TokenIds) -> str:
        """Text of ids, without special tokens."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def _prompt(self, template: str, question: Question) -> TokenIds:
        found = self._control.search(question.question + question.answer)
        if found:
            raise ValueError(
                f"question {question.id!r} contains the control token {found.group()!r}, which would end its turn or "
                "its trace; remove it from the text."
            )
        messages = [{"role": "user", "content": _fill(template, question)}]
        if self.config.system is not None:
            messages.insert(0, {"role": "system", "content": self.config.system})
        text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if not text.endswith(self.config.open_marker):
            text += self.config.open_marker
        return self._ids(text)

    def _ids(self, text: str) -> TokenIds:
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _control_tokens(self) -> set[str]:
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        return added | {self.config.open_marker.strip(), self.config.close_marker}


def _fill(template: str, question: Question) -> str:
    """Insert question and answer as they are: braces in them mean nothing."""
    return template.format(question=question.question, answer=question.answer)
