"""Verdicts on multiple-choice questions."""

import pytest

from megavar.records import Question
from megavar.verifiers import get_verifier, ground_truth

OPTIONS = "C\nA. 10\nB. 11\nC. 12\nD. red apple"
TABLE = [
    ("\\boxed{C}", "C", "correct"),
    ("\\boxed{(C)}", "C", "correct"),
    ("\\boxed{c}", "C", "correct"),
    ("\\boxed{\\text{C}}", "C", "correct"),
    ("\\boxed{\\textbf{(C) } 12}", "C", "correct"),
    ("\\boxed{C. 12}", "(C)", "correct"),
    ("\\boxed{C: 12}", "C.", "correct"),
    ("\\boxed{D}", "C", "wrong"),
    ("\\boxed{}", "C", "no_answer"),
    ("", "C", "no_answer"),
    ("I do not know.", "C", "no_answer"),
    ("The answer is (C).", "C", "correct"),
    ("The answer is C.", "C", "correct"),
    ("**Answer: C**", "C", "correct"),
    ("Answer: (C) 12", "C", "correct"),
    ("The correct answer is option C.", "C", "correct"),
    ("Option C is correct.", "C", "correct"),
    ("The answer is A or C.", "C", "wrong"),
    ("The answer is (A), no, the answer is (C).", "C", "correct"),
    ("The answer is (C). Wait, the answer is (D).", "C", "wrong"),
    ("The answer is not C", "C", "no_answer"),
    ("C", "C", "correct"),
    ("(C)", "C", "correct"),
    ("thinking...\n\nC.", "C", "correct"),
    ("\\boxed{A, C}", "A, C", "correct"),
    ("\\boxed{C, A}", "A, C", "correct"),
    ("\\boxed{AC}", "A, C", "correct"),
    ("\\boxed{A and C}", "A,C", "correct"),
    ("\\boxed{A}", "A, C", "wrong"),
    ("\\boxed{A, C}", "C", "wrong"),
    ("\\boxed{ABC}", "A, C", "wrong"),
    ("\\boxed{\\text{A}, \\text{C}}", "A, C", "correct"),
    ("\\boxed{12}", OPTIONS, "correct"),
    ("\\boxed{11}", OPTIONS, "wrong"),
    ("\\boxed{12.0}", OPTIONS, "correct"),
    ("\\boxed{red apple}", OPTIONS, "wrong"),
    ("\\boxed{13}", OPTIONS, "wrong"),
    ("\\boxed{12}", "C. 12", "correct"),
    ("\\boxed{12}", "C", "wrong"),
    ("\\boxed{E}", OPTIONS, "wrong"),
    ("The answer is 12.", OPTIONS, "correct"),
    ("\\boxed{12}", "C\nA. 12\nB. 11\nC. 12", "wrong"),
    ("The final answer is: $\\boxed{C}$", "C", "correct"),
    ("Answer: $C$", "C", "correct"),
    ("ANSWER: C", "C", "correct"),
    ("The answer is **C**.", "C", "correct"),
    ("The answer is: **(C) 12**", "C", "correct"),
    ("Therefore, the answer is $\\text{C}$.", "C", "correct"),
    ("\u7b54\u6848\u662fC", "C", "correct"),
    ("\u7b54\u6848\uff1aC", "C", "correct"),
    ("\\boxed{C}", "F. x", "wrong"),
]


@pytest.mark.parametrize("text", ["silent", "area", "island", "St. Louis", "U.S. dollars", "the right angle"])
def test_an_options_text_is_not_cut(text):
    gold = f"C\nA. loud\nB. other\nC. {text}"
    for response in (f"\\boxed{{{text}}}", f"The answer is {text}.", f"\\boxed{{C. {text}}}"):
        assert get_verifier("choice")(response, gold) == "correct", response


@pytest.mark.parametrize(("response", "gold", "verdict"), TABLE)
def test_verdicts(response, gold, verdict):
    assert get_verifier("choice")(response, gold) == verdict


@pytest.mark.parametrize("gold", ["Paris", "", "12", "c"])
def test_a_known_answer_that_is_no_letter_is_an_error(gold):
    with pytest.raises(ValueError, match="is not the letter of an option"):
        get_verifier("choice")("\\boxed{A}", gold)


def test_a_letter_that_is_none_of_the_options_is_an_error():
    with pytest.raises(ValueError, match="'E' is none of the options A, B"):
        get_verifier("choice")("\\boxed{A}", "E\nA. 1\nB. 2")


@pytest.mark.parametrize("listed", ["A) 11 B) 12", "(A) 11 (B) 12\n(C) 13 (D) 14", "A. one\nB. two\nA. 11\nB. 12"])
def test_options_that_are_not_one_a_line_are_not_taken(listed):
    gold = ground_truth(Question("q", f"Which number is even?\n{listed}", "B", verifier="choice"))
    assert gold == "B"
    assert get_verifier("choice")("\\boxed{B}", gold) == "correct"


def test_the_options_are_those_that_the_question_lists():
    text = "Which number is even?\n\n(A) 11\n(B) 12\n (C) 12\n(D) 13"
    gold = ground_truth(Question("q", text, "D", verifier="choice"))
    assert gold == "D\nA. 11\nB. 12\nC. 12\nD. 13"
    assert get_verifier("choice")("\\boxed{13}", gold) == "correct"
    assert get_verifier("choice")("\\boxed{12}", gold) == "wrong"  # the text of two options
