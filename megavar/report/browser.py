"""Data of the report's trace browser, as JSON-compatible values: questions, traces, weights, answers.

`page.js` renders it. To keep the page small, long texts are shortened and only a subset of the questions is included.
"""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from megavar.data.decode import Decoder
from megavar.joins import answers_by_trace, by_trace
from megavar.records import Answer, Question, Weight
from megavar.report.curves import question_ess
from megavar.report.run_view import Round, spread

MAX_QUESTIONS = 200
MAX_CHARACTERS = 4000


def browser_data(shown: Round, decode: Decoder, max_questions: int = MAX_QUESTIONS) -> list[dict[str, Any]]:
    """Up to `max_questions` of the round's weighted questions, evenly spaced in the round's order, with their traces.

    Raises:
        ValueError: naming a trace or answer that occurs twice.
    """
    trace_of, answers_of = by_trace(shown.traces), answers_by_trace(shown.answers)
    leakage_of = {(score.question_id, score.trace_index): score.leakage for score in shown.scores}
    ess_of = question_ess(shown.weights)
    weights_of: dict[str, list[Weight]] = {question_id: [] for question_id in ess_of}
    for row in shown.weights:
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
            "leakage": leakage_of.get((row.question_id, row.trace_index)),
            "status": row.status,
            "num_correct": sum(bool(answer.correct) for answer in answers),
            "num_answers": len(answers),
            "answers": _group(answers),
        }

    def show_question(question: Question) -> dict[str, Any]:
        gold_last = sorted(weights_of[question.id], key=lambda row: row.trace_index < 0)
        traces = [show_trace(row, question) for row in gold_last]
        return {
            "id": question.id,
            "question": shorten(question.question),
            "hint": shorten(question.answer),
            "ess": ess_of[question.id],
            "num_correct": sum(trace["num_correct"] for trace in traces),
            "num_answers": sum(trace["num_answers"] for trace in traces),
            "traces": traces,
        }

    weighted = [question for question in shown.questions if question.id in weights_of]
    return [show_question(question) for question in spread(weighted, max_questions)]


def shorten(text: str) -> str:
    """The text; if it is longer than `MAX_CHARACTERS`, without its middle."""
    num_omitted = len(text) - MAX_CHARACTERS
    if num_omitted <= 0:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[… {num_omitted} characters omitted …]\n{text[-half:]}"


def _group(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Distinct answers with their counts, in order of first appearance."""
    counts = Counter((answer.text, answer.verdict or "not verified") for answer in answers)
    return [{"text": shorten(text), "verdict": verdict, "count": count} for (text, verdict), count in counts.items()]
