"""Published traces of reasoning models."""

import re

from megavar.data.importers.files import Row
from megavar.data.importers.layout import Draft, Layout, Response, as_text, columns, finished, split_trace
from megavar.data.importers.programs import with_starter_code

_BOX_PLEASE = re.compile(
    r"^Return your final response within \\boxed\{\}\.\s*"
    r"|\s*(?:Please|Let's) (?:reason|think) step by step,? and (?:put|output) (?:your|the) final answer within "
    r"\\boxed\{\}\.\s*$"
)
_FINAL_ANSWER = re.compile(r"\n\s*\*\*Final Answer:?\*\*:?\s*\n")
MOST_ANSWER_WORDS = 10
"""Of s1K's solution, where it is an answer and not a text."""


def conversation(row: Row) -> Draft:
    """Bespoke-Stratos-17k, OpenThoughts-114k, OpenThoughts3: the first turns of user and assistant alone."""
    turns = [
        (turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in row["conversations"]
    ]
    user = next(text for speaker, text in turns if speaker in ("user", "human"))
    response = split_trace(next(text for speaker, text in turns if speaker in ("assistant", "gpt")))
    return Draft(
        _BOX_PLEASE.sub("", user),
        None,
        boxed=response.solution,
        responses=(response,),
        source=as_text(row.get("source")),
        may_be_unverifiable=True,
    )


def openthoughts_meta(row: Row) -> Draft:
    """OpenThoughts-114k with metadata: tests, or the box of the known solution, or else of the generated one."""
    known, generated = as_text(row.get("ground_truth_solution")), as_text(row["deepseek_solution"])
    response = Response(as_text(row["deepseek_reasoning"]), generated)
    tests = as_text(row.get("test_cases"))
    return Draft(
        with_starter_code(row["problem"], row.get("starter_code")),
        tests,
        boxed=known if known and "\\boxed" in known else generated,
        responses=(response,),
        verifier="math" if tests is None else "code",
        source=as_text(row.get("source")),
        may_be_unverifiable=True,
    )


def openr1(row: Row) -> Draft:
    """OpenR1-Math-220k: several generations; the human solution is left out."""
    return Draft(
        row["problem"],
        as_text(row["answer"]),
        responses=finished(row["generations"]),
        id=as_text(row.get("uuid")),
        source=as_text(row.get("source")),
    )


def s1k(row: Row) -> Draft:
    """s1K, and s1K-1.1 with DeepSeek's trace before Gemini's; a solution is an answer, a text with a box, or a text."""
    traces = row.get("thinking_trajectories") or [
        row.get("deepseek_thinking_trajectory"),
        row.get("gemini_thinking_trajectory"),
    ]
    attempts = row.get("attempt") or [row.get("deepseek_attempt"), row.get("gemini_attempt")]
    attempts = [attempts] if isinstance(attempts, str) else attempts
    pairs = [(as_text(trace), as_text(attempt)) for trace, attempt in zip(traces, attempts, strict=False)]
    solution = as_text(row["solution"])
    is_answer = solution is not None and "\\boxed" not in solution and len(solution.split()) <= MOST_ANSWER_WORDS
    return Draft(
        row["question"],
        solution if is_answer else None,
        boxed=solution,
        responses=tuple(Response(trace, attempt) for trace, attempt in pairs if trace is not None),
        source=as_text(row.get("source_type")),
        may_be_unverifiable=True,
    )


def limo(row: Row) -> Draft:
    """LIMO and LIMO-v2: the solution is the trace, up to its section "Final Answer"."""
    response = split_trace(row["solution"])
    if response.trace is None and response.solution is not None:
        headings = list(_FINAL_ANSWER.finditer(response.solution))
        end = headings[-1].start() if headings else len(response.solution)
        response = Response(response.solution[:end].strip() or None, response.solution[end:].strip() or None)
    return Draft(row["question"], as_text(row["answer"]), responses=(response,))


_S1K_OTHERS = columns("cot_type, source_type, metadata, cot, text")
LAYOUTS = (
    Layout(("bespoke_stratos", "openthoughts_114k"), columns("system, conversations"), conversation),
    Layout(
        ("openthoughts3",), columns("conversations"), conversation, columns("difficulty, source, domain, question, id")
    ),
    Layout(
        ("openthoughts_114k_meta",),
        columns("problem, deepseek_reasoning, deepseek_solution"),
        openthoughts_meta,
        columns("ground_truth_solution, domain, source, test_cases, starter_code"),
    ),
    Layout(
        ("openr1_220k",),
        columns("problem, answer, generations"),
        openr1,
        columns(
            "solution, problem_type, question_type, source, uuid, is_reasoning_complete, "
            "correctness_math_verify, correctness_llama, finish_reasons, correctness_count, messages, "
            "problem_is_valid, solution_is_valid"
        ),
    ),
    Layout(
        ("s1k",),
        columns("question, solution, thinking_trajectories"),
        s1k,
        _S1K_OTHERS | {"attempt"},
    ),
    Layout(
        ("s1k_1.1", "s1k"),
        columns("question, solution, deepseek_thinking_trajectory, deepseek_attempt"),
        s1k,
        _S1K_OTHERS
        | columns(
            "gemini_thinking_trajectory, gemini_attempt, gemini_grade, gemini_grade_reason, deepseek_grade, "
            "deepseek_grade_reason"
        ),
    ),
    Layout(("limo",), columns("question, solution, answer"), limo, columns("text")),
)
