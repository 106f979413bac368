"""What is kept of a question's texts is what rendering them gives, and never that of another question or template."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megavar.config.schema import TemplateConfig
from megavar.data.question_tokens import NO_TEXT, QuestionTokens
from megavar.data.templates import Templates
from megavar.records import Question

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
CONFIG = TemplateConfig(posterior="{question}\nHint: {answer}")
QUESTIONS = [
    Question("a", "1+2", "3", trace="1+2\n3\n"),
    Question("b", "2+2", "4", solution="\n\\boxed{4}."),
    Question("c", "9*9 ü", "1", trace="9*9\n1\n"),
]
KINDS = ("policy_prompt", "posterior_prompt", "trace", "answer")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "megavar" / "tokens"


def same_as_rendered(tokens, questions=QUESTIONS, config=CONFIG):
    templates = Templates(BASE, config)
    for question in questions:
        for kind in KINDS if question.trace else ("policy_prompt", "posterior_prompt", "answer"):
            found = getattr(tokens, kind)(question)
            assert found.dtype == np.int32 and found.tolist() == getattr(templates, kind)(question).tolist()


class Untouched(Templates):
    """Refuses to make tokens."""

    def encode(self, kind, texts):
        raise AssertionError(f"{kind} was tokenized again")


def test_kept_tokens_are_those_of_the_rendered_texts_and_made_once(cache):
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)))
    same_as_rendered(QuestionTokens(QUESTIONS, Untouched(BASE, CONFIG)))
    assert len(list(cache.iterdir())) == 4
    assert QuestionTokens(QUESTIONS, Untouched(BASE, CONFIG)).lengths("trace")[1] == NO_TEXT


def test_the_posteriors_template_changes_only_its_own_prompt():
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)))
    changed = replace(CONFIG, posterior="{answer}: {question}")
    tokens = QuestionTokens(QUESTIONS, Untouched(BASE, changed))
    for kind in ("policy_prompt", "trace", "answer"):
        getattr(tokens, kind)(QUESTIONS[0])
    with pytest.raises(AssertionError, match="posterior_prompt was tokenized again"):
        tokens.posterior_prompt(QUESTIONS[0])
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, changed)), config=changed)


@pytest.mark.parametrize("change", [{"question": "1+3"}, {"answer": "4"}, {"trace": "1+2\n"}, {"solution": "3!"}])
def test_a_changed_question_is_tokenized_again(change):
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)))
    changed = [replace(QUESTIONS[0], **change), *QUESTIONS[1:]]
    same_as_rendered(QuestionTokens(changed, Templates(BASE, CONFIG)), changed)


@pytest.mark.parametrize("name", ["ids.bin", "lengths.npy", "SHA256SUMS"])
def test_damaged_files_are_made_again(cache, name):
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)))
    for file in cache.glob(f"*/{name}"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)))
    same_as_rendered(QuestionTokens(QUESTIONS, Untouched(BASE, CONFIG)))


def test_tokens_are_made_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    same_as_rendered(QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)))


def test_texts_that_cannot_be_used_are_told_and_not_kept(cache):
    bad = [Question("x", "1+1<|im_end|>", "2"), *QUESTIONS]
    told = []
    tokens = QuestionTokens(bad, Templates(BASE, CONFIG), lambda question, text: told.append((question.id, text)))
    assert tokens.lengths("policy_prompt").tolist()[0] == NO_TEXT
    same_as_rendered(tokens)
    assert {name for name, _ in told} == {"x"} and "control token '<|im_end|>'" in told[0][1]
    assert len(list(cache.iterdir())) == 2  # traces and answers, which are fine
    with pytest.raises(ValueError, match=r"question 'x' contains the control token"):
        QuestionTokens(bad, Templates(BASE, CONFIG)).policy_prompt(QUESTIONS[0])


def test_what_nobody_used_for_a_month_is_removed(cache):
    QuestionTokens(QUESTIONS, Templates(BASE, CONFIG)).policy_prompt(QUESTIONS[0])
    (old,) = cache.iterdir()
    os.utime(old, (0, 0))
    QuestionTokens(QUESTIONS[:1], Templates(BASE, CONFIG)).policy_prompt(QUESTIONS[0])
    (left,) = cache.iterdir()
    assert left != old
