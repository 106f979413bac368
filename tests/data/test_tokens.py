"""Targets and weights of training sequences, by the demo's tokenizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megavar.config.schema import TemplateConfig
from megavar.data.templates import Templates
from megavar.data.tokens import (
    gold_posterior_sequences,
    gold_sequences,
    policy_sequences,
    rollout_posterior_sequences,
)
from megavar.joins import count_correct
from megavar.records import Answer, Question, Trace, Weight

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
TOKENIZER = AutoTokenizer.from_pretrained(BASE)
TEMPLATES = Templates(BASE, TemplateConfig(posterior="{question}\nHint: {answer}", solution="\n\\boxed{{{answer}}}"))
QUESTION = Question("q", "1+{2}", "3", trace="1+2=3;")


def ids(text):
    return np.array(TOKENIZER(text, add_special_tokens=False)["input_ids"], np.int32)


def decode(tokens):
    return TOKENIZER.decode(tokens)


def trace(index, text="1+2=3;", sampler="posterior"):
    return Trace("q", index, 1, sampler, ids("p"), ids(text + "</think>"), None, "closed", 0)


def answer(trace_index, index, text, correct):
    return Answer("q", trace_index, index, 1, ids(text), text, "stop", 0, correct, "")


def weight(index, value, status="ok"):
    return Weight("q", index, 1, 0.0, 0.0, 0.0, value, status)


def test_gold_sequences_train_trace_and_answer_of_the_policy_and_the_trace_of_the_posterior():
    (policy,) = gold_sequences([QUESTION, Question("r", "x", "1")], TEMPLATES, 100)
    assert decode(policy.target_ids) == "1+2=3;</think>\n\\boxed{3}<|im_end|>" and policy.weight == 1.0
    assert policy.prompt_ids.tolist() == TEMPLATES.policy_prompt(QUESTION).tolist()
    (posterior,) = gold_posterior_sequences([QUESTION], TEMPLATES, 100)
    assert decode(posterior.target_ids) == "1+2=3;</think>"
    assert posterior.prompt_ids.tolist() == TEMPLATES.posterior_prompt(QUESTION).tolist()


def test_a_gold_sequence_over_the_limit_is_refused_by_question():
    for build in (gold_sequences, gold_posterior_sequences):
        (sequence,) = build([QUESTION], TEMPLATES, 100)
        assert len(build([QUESTION], TEMPLATES, sequence.num_tokens)) == 1
        limit = sequence.num_tokens - 1
        with pytest.raises(ValueError, match=rf"question 'q'.*{limit + 1} tokens.*max_sequence_tokens={limit}"):
            build([QUESTION], TEMPLATES, limit)


def test_distinct_correct_answers_share_their_traces_weight():
    answers = [answer(0, 0, "a", True), answer(0, 1, "b", True), answer(0, 2, "a", True), answer(0, 3, "c", False)]
    found = policy_sequences([QUESTION], [trace(0)], answers, [weight(0, 0.6)], TEMPLATES, "all_correct")
    assert [(decode(s.target_ids), s.weight) for s in found] == [("1+2=3;</think>a", 0.3), ("1+2=3;</think>b", 0.3)]
    first = policy_sequences([QUESTION], [trace(0)], answers, [weight(0, 0.6)], TEMPLATES, "first_correct")
    assert [(decode(s.target_ids), s.weight) for s in first] == [("1+2=3;</think>a", 0.6)]
    reference = policy_sequences([QUESTION], [trace(0)], [], [weight(0, 0.6)], TEMPLATES, "reference")
    assert [decode(s.target_ids) for s in reference] == ["1+2=3;</think>\n\\boxed{3}<|im_end|>"]
    assert all(s.prompt_ids.tolist() == TEMPLATES.policy_prompt(QUESTION).tolist() for s in found + first)


def test_a_correct_answer_cut_by_the_limit_is_used_only_where_none_is_complete():
    cut = replace(answer(0, 0, "\n\\boxed{3} and", True), finish="length")
    for group, expected in (
        ([cut, answer(0, 1, "\n\\boxed{3}", True)], ["1+2=3;</think>\n\\boxed{3}"]),
        ([cut, answer(0, 1, "\n\\boxed{4}", False)], ["1+2=3;</think>\n\\boxed{3} and"]),
    ):
        found = policy_sequences([QUESTION], [trace(0)], group, [weight(0, 1.0)], TEMPLATES, "all_correct")
        assert [decode(sequence.target_ids) for sequence in found] == expected


def test_answers_without_a_verdict_are_not_counted_as_wrong():
    given = [answer(0, 0, "3", True), answer(0, 1, "4", False)]
    assert count_correct(given) == 1 and count_correct([]) == 0
    with pytest.raises(ValueError, match=r"answer 2 of trace 0 of question 'q' has no verdict; run `megavar verify`"):
        count_correct([*given, answer(0, 2, "5", None)])


def test_fallback_weights_of_a_question_without_correct_answer_train_the_reference_answer():
    wrong, fallback = [answer(0, 0, "a", False)], [weight(0, 0.6, "no_correct_trace")]
    (found,) = policy_sequences([QUESTION], [trace(0)], wrong, fallback, TEMPLATES, "all_correct")
    assert (decode(found.target_ids), found.weight) == ("1+2=3;</think>\n\\boxed{3}<|im_end|>", 0.6)


def test_a_gold_weight_takes_the_data_sets_own_trace():
    (found,) = policy_sequences([QUESTION], [], [], [weight(-1, 1.0, "gold")], TEMPLATES, "all_correct")
    assert decode(found.target_ids) == "1+2=3;</think>\n\\boxed{3}<|im_end|>"


def test_rows_are_joined_by_identity_not_by_position():
    traces = [trace(1, "one"), trace(0, "zero")]
    answers = [answer(1, 0, "A1", True), answer(0, 0, "A0", True)]
    weights = [weight(0, 0.25), weight(1, 0.75)]
    found = policy_sequences([QUESTION], traces, answers, weights, TEMPLATES, "all_correct")
    assert {(decode(s.target_ids), s.weight) for s in found} == {("zero</think>A0", 0.25), ("one</think>A1", 0.75)}
    rolled = rollout_posterior_sequences([QUESTION], traces, weights, TEMPLATES)
    assert {(decode(s.target_ids), s.weight) for s in rolled} == {("zero</think>", 0.25), ("one</think>", 0.75)}


def policy(questions=(QUESTION,), traces=None, answers=None, weights=None):
    traces, answers = traces or [trace(0)], answers or [answer(0, 0, "a", True)]
    return policy_sequences(questions, traces, answers, weights or [weight(0, 1.0)], TEMPLATES, "all_correct")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"weights": [weight(5, 1.0)]}, "trace 5 of question 'q' has a weight, but is not among the sampled"),
        ({"weights": [replace(weight(0, 1.0), round=2)]}, "trace 0 of question 'q'.*not among.*round 2"),
        ({"weights": [weight(0, 1.0), weight(0, 0.5)]}, "trace 0 of question 'q' occurs twice"),
        ({"weights": [weight(0, 0.0)]}, "no trace has weight"),
        ({"weights": [weight(-1, 1.0, "gold")], "questions": [Question("q", "x", "1")]}, "'q' has no gold trace"),
        ({"traces": [trace(0), trace(0)]}, "trace 0 of question 'q' occurs twice"),
        ({"questions": []}, "trace 0 of question 'q'.*its question is not in the question file"),
        ({"answers": [answer(0, 0, "a", False)]}, "trace 0 of question 'q' has weight but no correct answer"),
        ({"answers": [answer(1, 0, "a", True)]}, "trace 0 of question 'q' has weight but no correct answer"),
        ({"answers": [answer(0, 0, "a", True), answer(0, 0, "b", True)]}, "answer 0 of trace 0 of .* occurs twice"),
        ({"answers": [answer(0, 0, "a", True), answer(0, 1, "b", None)]}, "trace 0 .* answer 1 .*megavar verify"),
        ({"answers": [replace(answer(0, 0, "a", True), round=2)]}, "trace 0 .* answer 0 .*round=2"),
    ],
)
def test_missing_doubled_and_foreign_rows_are_refused_by_name(rows, message):
    assert len(policy()) == 1
    with pytest.raises(ValueError, match=message):
        policy(**rows)


def test_rollouts_of_unknown_questions_or_without_weight_are_refused():
    with pytest.raises(ValueError, match=r"trace 0 of question 'q'.*its question is not"):
        rollout_posterior_sequences([], [trace(0)], [weight(0, 1.0)], TEMPLATES)
    with pytest.raises(ValueError, match="no trace has weight"):
        rollout_posterior_sequences([QUESTION], [trace(0)], [weight(0, 0.0)], TEMPLATES)


@pytest.mark.parametrize("build", [gold_sequences, gold_posterior_sequences])
def test_questions_without_any_gold_trace_are_refused(build):
    with pytest.raises(ValueError, match="no question has a gold trace"):
        build([Question("q", "x", "1")], TEMPLATES, 100)
