"""What the report's browser of traces shows, as plain values for JSON: questions, traces, weights, answers.

`page.js` draws it. A page must stay small, so questions are capped, evenly over the round's order, and so are texts.
"""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np

from megavar.data.decode import Decoder
from megavar.joins import answers_by_trace, by_trace
from megavar.records import Answer, Question, Weight
from megavar.report.curves import question_sizes
from megavar.report.finished import Round

MOST_QUESTIONS = 200
MOST_CHARACTERS = 4000


def browser_data(found: Round, decode: Decoder, most_questions: int = MOST_QUESTIONS) -> list[dict[str, Any]]:
    """At most `most_questions` of the round's questions with all their traces, in the round's order.

    Raises:
        ValueError: naming a trace or answer that occurs twice.
    """
    trace_of, answers_of = by_trace(found.traces), answers_by_trace(found.answers)
    sizes = question_sizes(found.weights)
    weights_of: dict[str, list[Weight]] = {question_id: [] for question_id in sizes}
    for row in found.weights:
        weights_of[row.question_id].append(row)

    def show_trace(row: Weight, question: Question) -> dict[str, Any]:
        trace = trace_of.get((row.question_id, row.trace_index))
        answers = answers_of.get((row.question_id, row.trace_index), [])
        return {
            "index": row.trace_index,
            "text": shorten(decode(trace.trace_ids) if trace else question.trace or ""),
            "tokens": len(trace.trace_ids) if trace else None,
            "weight": row.weight,
            "log_ratio": row.log_ratio if isfinite(row.log_ratio) else None,
            "status": row.status,
            "num_correct": sum(bool(answer.correct) for answer in answers),
            "num_answers": len(answers),
            "answers": _group(answers),
        }

    def show_question(question: Question) -> dict[str, Any]:
        traces = [show_trace(row, question) for row in weights_of[question.id]]
        return {
            "id": question.id,
            "question": shorten(question.question),
            "hint": shorten(question.answer),
            "ess": sizes[question.id],
            "num_correct": sum(trace["num_correct"] for trace in traces),
            "num_answers": sum(trace["num_answers"] for trace in traces),
            "traces": traces,
        }

    weighed = [question for question in found.questions if question.id in weights_of]
    return [show_question(question) for question in spread(weighed, most_questions)]


def spread(questions: Sequence[Question], most: int) -> list[Question]:
    """All questions, or `most` of them, evenly over their order, the first and the last among them."""
    if len(questions) <= most:
        return list(questions)
    return [questions[index] for index in np.linspace(0, len(questions) - 1, most).round().astype(int)]


def shorten(text: str) -> str:
    """The text, or the two ends of a long one and how much lies between them."""
    left_out = len(text) - MOST_CHARACTERS
    if left_out <= 0:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {left_out} characters left out …]\n{text[-half:]}"


def _group(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Equal answers once, with their number, in the order of first appearance."""
    counts = Counter((answer.text, answer.verdict or "not verified") for answer in answers)
    return [{"text": shorten(text), "verdict": verdict, "count": count} for (text, verdict), count in counts.items()]
