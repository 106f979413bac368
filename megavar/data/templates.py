"""Token ids of what the models are asked and of what they shall write: prompts, gold traces, reference answers.

The policy is shown the question, the posterior the question and the hint. Prompt and trace are tokenized apart and
joined as ids, since the same trace follows two different prompts.
"""

import re
import string
from pathlib import Path
from typing import Any

import numpy as np

from megavar.config.schema import TemplateConfig
from megavar.records import Question, TokenIds


class Templates:
    """A tokenizer with the run's templates.

    Raises:
        ValueError: if the tokenizer has no chat template or no end-of-sequence token, or a template does not insert
            what it must, or inserts what it must not (above all the answer in the policy's).
    """

    def __init__(self, model: Path, config: TemplateConfig) -> None:
        self.config = config
        _check_fields("policy", config.policy, {"question"}, {"question"})
        # Without the answer it is the ablation of a posterior that has no hint.
        _check_fields("posterior", config.posterior, {"question"}, {"question", "answer"})
        _check_fields("solution", config.solution, {"answer"}, {"question", "answer"})
        # Here and not above: it brings torch, and looking at a run needs neither.
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        if not self._tokenizer.is_fast:
            raise ValueError(f"{model} has no tokenizer.json; give the folder of a model with a fast tokenizer.")
        if self._tokenizer.chat_template is None or self._tokenizer.eos_token_id is None:
            raise ValueError(f"{model}: the tokenizer has no chat template or no eos token; add both to the folder.")
        # Without transformers' wrapper around each call, which takes most of the time of short texts.
        self._encoder: Any = self._tokenizer.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._control = re.compile("|".join(map(re.escape, self._control_tokens())))

    def policy_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] of x."""
        return self._prompt(self.config.policy, question)

    def posterior_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] of x with the hint y'."""
        return self._prompt(self.config.posterior, question)

    def trace(self, question: Question) -> TokenIds:
        """[trace tokens] of the gold trace and its close marker.

        Raises:
            ValueError: if the question has no gold trace.
        """
        if question.trace is None:
            raise ValueError(f"question {question.id!r} has no gold trace; use objective.on_no_correct_trace=drop.")
        self._refuse_control(question, "trace")
        return self._ids(question.trace + self.config.close_marker)

    def answer(self, question: Question) -> TokenIds:
        """[answer tokens] of the reference answer and the end of sequence."""
        self._refuse_control(question, "answer" if question.solution is None else "solution")
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
        self._refuse_control(question, "question")
        self._refuse_control(question, "answer")
        messages = [{"role": "user", "content": _fill(template, question)}]
        if self.config.system is not None:
            messages.insert(0, {"role": "system", "content": self.config.system})
        text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # A chat template may end with the marker itself, and Jinja drops a newline that a template ends with.
        marker = self.config.open_marker
        return self._ids(text.removesuffix(marker).removesuffix(marker.rstrip()) + marker)

    def _ids(self, text: str) -> TokenIds:
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.int32)

    def _refuse_control(self, question: Question, name: str) -> None:
        found = self._control.search(getattr(question, name))
        if found:
            raise ValueError(
                f"question {question.id!r} contains the control token {found.group()!r} in its {name}, which would end "
                "a turn or a trace; remove it from the text."
            )

    def _control_tokens(self) -> set[str]:
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        # A model may do without the open marker, and the empty string is in every text.
        return (added | {self.config.open_marker.strip(), self.config.close_marker}) - {""}


def _fill(template: str, question: Question) -> str:
    """Insert question and answer as they are: braces in them mean nothing."""
    return template.format(question=question.question, answer=question.answer)


def _check_fields(name: str, template: str, needed: set[str], allowed: set[str]) -> None:
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"templates.{name}={template!r}: {error}; write a brace that is text twice.") from error
    if not needed <= found <= allowed:
        raise ValueError(
            f"templates.{name}={template!r} inserts {sorted(found)}; it must insert {sorted(needed)} and may insert "
            f"{sorted(allowed)}. Write a brace that is text twice."
        )
