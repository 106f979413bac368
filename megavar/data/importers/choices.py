"""Published questions with options, of which one is right."""

import hashlib
import string

from megavar.data.importers.files import Row
from megavar.data.importers.layout import Draft, Layout, as_text, columns


def gpqa(row: Row) -> Draft:
    """GPQA: the right answer and three wrong ones, in an order that the row's id gives."""
    right = _one_line(row["Correct Answer"])
    options = [right, *(_one_line(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3))]
    published = as_text(row.get("Record ID"))
    key = published or row["Question"]
    options.sort(key=lambda option: hashlib.sha256(f"{key}\n{option}".encode()).digest())
    return Draft(
        _with_options(row["Question"], options),
        string.ascii_uppercase[options.index(right)],
        verifier="choice",
        id=published,
        source=as_text(row.get("High-level domain")),
    )


def mmlu_pro(row: Row) -> Draft:
    """MMLU-Pro: up to ten options, in their published order, which the published letter counts in."""
    options = [_one_line(option) for option in row["options"]]
    letter = as_text(row["answer"]) or string.ascii_uppercase[row["answer_index"]]
    return Draft(
        _with_options(row["question"], options),
        letter,
        verifier="choice",
        id=as_text(row.get("question_id")),
        source=as_text(row.get("category")),
    )


def _one_line(option: str) -> str:
    return " ".join(option.split())


def _with_options(question: str, options: list[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), "", *lines])


LAYOUTS = (
    Layout(
        ("gpqa",),
        columns("Question, Correct Answer, Incorrect Answer 1, Incorrect Answer 2, Incorrect Answer 3"),
        gpqa,
        takes_others=True,
    ),
    Layout(
        ("mmlu_pro",),
        columns("question, options, answer"),
        mmlu_pro,
        columns("question_id, answer_index, cot_content, category, src"),
    ),
)
