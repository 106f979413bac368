"""Prompts, gold traces and reference answers as text and as ids, by the demo's tokenizer and variants of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megavar.config.schema import TemplateConfig
from megavar.data.templates import Templates
from megavar.records import Question

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
TOKENIZER = AutoTokenizer.from_pretrained(BASE)
CONFIG = TemplateConfig(posterior="{question}\nHint: {answer}", solution="\n\\boxed{{{answer}}}")
TEMPLATES = Templates(BASE, CONFIG)
QUESTION = Question("q", "1+{2}", "3", trace="1+2=3;")
OPEN = "<|im_start|>assistant\n<think>\n"


def decode(tokens):
    return TOKENIZER.decode(tokens)


def prompt(config, templates_at=BASE):
    return decode(Templates(templates_at, config).policy_prompt(QUESTION))


def test_prompts_are_the_chat_template_with_an_open_thought():
    assert decode(TEMPLATES.policy_prompt(QUESTION)) == f"<|im_start|>user\n1+{{2}}<|im_end|>\n{OPEN}"
    assert decode(TEMPLATES.posterior_prompt(QUESTION)) == f"<|im_start|>user\n1+{{2}}\nHint: 3<|im_end|>\n{OPEN}"


def test_the_system_text_comes_first():
    expected = f"<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n1+{{2}}<|im_end|>\n{OPEN}"
    assert prompt(replace(CONFIG, system="add")) == expected


@pytest.mark.parametrize("ending", ["", "<think>", "<think>\n", "{{ '<think>\\n' }}"])
def test_the_open_marker_is_there_once_whether_or_not_the_chat_template_has_it(tmp_path, ending):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{{ messages[0].content }}:" + ending
    tokenizer.save_pretrained(tmp_path)
    assert prompt(CONFIG, tmp_path) == "1+{2}:<think>\n"


def test_a_model_may_do_without_the_open_marker():
    assert prompt(replace(CONFIG, open_marker="")).endswith("<|im_start|>assistant\n")


def test_markers_are_single_tokens_and_answers_end_the_turn():
    assert TEMPLATES.close_token == TOKENIZER.convert_tokens_to_ids("</think>")
    assert TEMPLATES.policy_prompt(QUESTION).tolist().count(TOKENIZER.convert_tokens_to_ids("<think>")) == 1
    assert decode(TEMPLATES.answer(QUESTION)) == "\n\\boxed{3}<|im_end|>"
    assert decode(TEMPLATES.answer(replace(QUESTION, solution="3!"))) == "3!<|im_end|>"
    assert decode(TEMPLATES.trace(QUESTION)) == "1+2=3;</think>"


def test_the_reply_is_around_the_questions_solution_or_the_one_made_of_its_answer():
    templates = Templates(BASE, replace(CONFIG, reply="\n[{solution}]"))
    assert decode(templates.answer(QUESTION)) == "\n[\n\\boxed{3}]<|im_end|>"
    assert decode(templates.answer(replace(QUESTION, solution="{3}!"))) == "\n[{3}!]<|im_end|>"
    assert templates.digest("answer") != TEMPLATES.digest("answer")


def test_a_close_marker_of_several_tokens_has_no_id():
    templates = Templates(BASE, replace(CONFIG, close_marker="END"))
    assert templates.close_token is None
    assert decode(templates.trace(QUESTION)) == "1+2=3;END"


@pytest.mark.parametrize("token", ["<|im_end|>", "</think>", "<think>"])
@pytest.mark.parametrize(
    ("name", "render"),
    [
        ("question", TEMPLATES.policy_prompt),
        ("question", TEMPLATES.posterior_prompt),
        ("answer", TEMPLATES.posterior_prompt),
        ("answer", TEMPLATES.answer),
        ("solution", TEMPLATES.answer),
        ("trace", TEMPLATES.trace),
    ],
)
def test_control_tokens_in_what_users_wrote_are_refused(token, name, render):
    question = replace(QUESTION, **{name: f"a{token}b"})
    with pytest.raises(
        ValueError, match=rf"question 'q' contains the control token '.*{token[1:-1][-5:]}.*in its {name}"
    ):
        render(question)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"policy": "{question} ({answer})"},
            r"templates\.policy=.* has the placeholders \['answer', 'question'\]; it must have",
        ),
        ({"policy": "Solve."}, r"templates\.policy=.* has the placeholders \[\]; it must have \['question'\]"),
        ({"policy": "{quesion}"}, r"templates\.policy=.* has the placeholders \['quesion'\]"),
        (
            {"policy": "{question} as \\boxed{}"},
            r"templates\.policy=.* has the placeholders \['', 'question'\].*Double literal braces",
        ),
        ({"policy": "{question} {"}, r"templates\.policy=.*double literal braces"),
        ({"posterior": "{answer}"}, r"templates\.posterior=.* must have \['question'\]"),
        ({"solution": "It is so."}, r"templates\.solution=.* must have \['answer'\]"),
        ({"reply": "{answer}"}, r"templates\.reply=.* must have \['solution'\]"),
    ],
)
def test_templates_that_leak_lose_or_misname_a_field_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Templates(BASE, replace(CONFIG, **change))


def test_a_posterior_without_hint_is_allowed():
    templates = Templates(BASE, replace(CONFIG, posterior="{question}"))
    assert templates.posterior_prompt(QUESTION).tolist() == templates.policy_prompt(QUESTION).tolist()


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a chat template and an eos token"):
        Templates(tmp_path, CONFIG)
