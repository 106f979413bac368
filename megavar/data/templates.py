"""Renders and tokenizes prompts, gold traces and reference answers.

The policy's prompt contains the question, the posterior's also the answer as a hint. Prompt and trace are tokenized
separately and concatenated as ids, so the same trace ids can be scored under both prompts.
"""

import hashlib
import json
import os
import re
import string
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megavar.config.schema import TemplateConfig
from megavar.records import Question, TokenIds


class Templates:
    """The tokenizer of a Hugging Face folder with the run's prompt templates.

    Raises:
        ValueError: if the tokenizer has no chat template or no end-of-sequence token, or a template lacks a required
            placeholder or contains a forbidden one (above all the answer in the policy's prompt).
    """

    def __init__(self, model: Path, config: TemplateConfig) -> None:
        self.config = config
        _check_placeholders("policy", config.policy, {"question"}, {"question"})
        # Without {answer}: the ablation of a posterior without a hint.
        _check_placeholders("posterior", config.posterior, {"question"}, {"question", "answer"})
        _check_placeholders("solution", config.solution, {"answer"}, {"question", "answer"})
        _check_placeholders("reply", config.reply, {"solution"}, {"solution"})
        # Imported here because it imports torch, which the report does not need.
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that a later fork is no news
        self._model = model
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of tokenizers, transformers and what they read with: there is no list of them
            raise ValueError(
                f"{model}: its tokenizer cannot be loaded ({_described(error)}); correct or copy again its "
                "tokenizer.json and tokenizer_config.json."
            ) from error
        if not self._tokenizer.is_fast:
            raise ValueError(f"{model} has no tokenizer.json; give the folder of a model with a fast tokenizer.")
        if self._tokenizer.chat_template is None or self._tokenizer.eos_token_id is None:
            raise ValueError(f"{model}: the tokenizer needs a chat template and an eos token; add them to its files.")
        # The tokenizers backend, called directly: transformers' wrapper takes most of the time for short texts.
        self._encoder: Any = self._tokenizer.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._control = re.compile("|".join(map(re.escape, self._control_tokens())))

    def policy_prompt(self, question: Question) -> TokenIds:
        """int32 ids [prompt tokens] of the policy's prompt for x, up to and including the open marker.

        Raises:
            ValueError: if question or answer contains a control token; so do all methods that render the user's text.
        """
        return self._encoded("policy_prompt", question)

    def posterior_prompt(self, question: Question) -> TokenIds:
        """int32 ids [prompt tokens] of the posterior's prompt for x with the hint y'."""
        return self._encoded("posterior_prompt", question)

    def trace(self, question: Question) -> TokenIds:
        """int32 ids [trace tokens] of the gold trace z, up to and including the close marker.

        Raises:
            ValueError: if the question has no gold trace, or it contains a control token.
        """
        return self._encoded("trace", question)

    def answer(self, question: Question) -> TokenIds:
        """int32 ids [answer tokens] of the reference answer y', up to and including the end-of-sequence token."""
        return self._encoded("answer", question)

    def text(self, kind: str, question: Question) -> str:
        """What the method `kind` above encodes.

        Raises:
            ValueError: if the text contains a control token, or there is none.
        """
        if kind == "policy_prompt":
            return self._prompt(self.config.policy, question)
        if kind == "posterior_prompt":
            return self._prompt(self.config.posterior, question)
        if kind == "answer":
            self._reject_control_tokens(question, "answer" if question.solution is None else "solution")
            return self.config.reply.format(solution=reference_solution(question, self.config.solution))
        if question.trace is None:
            raise ValueError(f"question {question.id!r} has no gold trace; use objective.on_no_correct_trace=drop.")
        self._reject_control_tokens(question, "trace")
        return question.trace + self.config.close_marker

    def encode(self, kind: str, texts: Sequence[str]) -> list[TokenIds]:
        """[tokens] int32 ids of texts of one kind, in threads."""
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        end = [self.end_token] if kind == "answer" else []
        return [np.array(each.ids + end, np.int32) for each in encoded]

    def digest(self, kind: str) -> str:
        """Identifies what makes ids of a question's text: tokenizer, templates and this code."""
        template: list[str | None] = []
        if kind.endswith("prompt"):
            template = [self.config.system, self.config.policy if kind == "policy_prompt" else self.config.posterior]
        elif kind == "answer":
            template = [self.config.solution, self.config.reply]
        markers = [self.config.open_marker, self.config.close_marker]
        parts = [kind, version("transformers"), version("tokenizers"), *markers, *template]
        digest = hashlib.sha256(json.dumps(parts).encode())
        names = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")
        files = [file for file in sorted(self._model.iterdir()) if file.is_file() and file.name.startswith(names)]
        for file in (Path(__file__), *files):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    @property
    def end_token(self) -> int:
        """Token id that ends an answer: the tokenizer's end of sequence."""
        return int(self._tokenizer.eos_token_id)

    @property
    def largest_token(self) -> int:
        """The largest token id of the tokenizer."""
        return int(max(self._tokenizer.get_vocab().values()))

    @property
    def close_token(self) -> int | None:
        """Token id of the close marker; None if it is more than one token."""
        ids = self._encoder.encode(self.config.close_marker, add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def decode(self, ids: TokenIds) -> str:
        """Decode ids to text, without special tokens."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def policy_text(self, question: Question) -> tuple[str, str]:
        """The policy's prompt as text, and the user's message in it."""
        message = _fill(self.config.policy, question)
        return self._render(message), message

    def _prompt(self, template: str, question: Question) -> str:
        self._reject_control_tokens(question, "question")
        self._reject_control_tokens(question, "answer")
        return self._render(_fill(template, question))

    def _encoded(self, kind: str, question: Question) -> TokenIds:
        (ids,) = self.encode(kind, [self.text(kind, question)])
        return ids

    def _render(self, message: str) -> str:
        messages = [{"role": "user", "content": message}]
        if self.config.system is not None:
            messages.insert(0, {"role": "system", "content": self.config.system})
        try:
            text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # of jinja and of what the template calls
            raise ValueError(
                f"{self._model}: its chat template cannot be rendered ({_described(error)}); correct "
                f"chat_template.jinja, or chat_template in tokenizer_config.json{self._about_system()}."
            ) from error
        # Some chat templates already append the marker, and Jinja strips a template's trailing newline.
        marker = self.config.open_marker
        return text.removesuffix(marker).removesuffix(marker.rstrip()) + marker

    def _about_system(self) -> str:
        return "" if self.config.system is None else ", or leave out templates.system if it takes no system message"

    def _reject_control_tokens(self, question: Question, name: str) -> None:
        match = self._control.search(getattr(question, name))
        if match and name == "trace" and match.group() in (self.config.open_marker.strip(), self.config.close_marker):
            raise ValueError(
                f"question {question.id!r} contains the control token {match.group()!r} in its trace, which seems to "
                f"be a whole generation: put what is between {self.config.open_marker.strip()} and "
                f"{self.config.close_marker} into `trace`, and what follows into `solution`."
            )
        if match:
            raise ValueError(
                f"question {question.id!r} contains the control token {match.group()!r} in its {name}, which would end "
                "a turn or a trace; remove it from the text."
            )

    def _control_tokens(self) -> set[str]:
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        # An empty open marker is allowed, but as a pattern it would match every text.
        return (added | {self.config.open_marker.strip(), self.config.close_marker}) - {""}


def _described(error: Exception) -> str:
    """An exception of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def reference_solution(question: Question, template: str) -> str:
    """What `templates.reply` puts into the reference answer y': `solution`, or the answer in `templates.solution`."""
    return question.solution or _fill(template, question)


def shown_answer(question: Question) -> str:
    """The answer as texts show it: the first of several aliases; the solution, where `answer` holds tests or a task."""
    if question.verifier == "text":
        return question.answer.split("|")[0].strip()
    if question.verifier in ("code", "countdown") and question.solution is not None:
        return question.solution.strip()
    return question.answer


def _fill(template: str, question: Question) -> str:
    """Fill in question and answer verbatim; braces in them are not interpreted."""
    return template.format(question=question.question, answer=shown_answer(question))


def _check_placeholders(name: str, template: str, required: set[str], allowed: set[str]) -> None:
    try:
        placeholders = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(
            f"templates.{name}={template!r:.300}: {error}; double literal braces: {{{{ and }}}}."
        ) from error
    if not required <= placeholders <= allowed:
        raise ValueError(
            f"templates.{name}={template!r:.300} has the placeholders {sorted(placeholders)!s:.200}; it must have "
            f"{sorted(required)} and may have {sorted(allowed)}. Double literal braces: {{{{ and }}}}."
        )
