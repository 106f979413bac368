"""Published questions of mathematics with a known answer: training sets without traces, and benchmarks."""

import re

from megavar.data.importers.files import Row
from megavar.data.importers.layout import Draft, Layout, LeftOut, Reason, Response, as_text, columns

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_DAPO = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"\$?Answer(?: \(without quotes\))? where \$?Answer is the answer to the problem\.\s*"
    r'|\s*Remember to put your answer on its own line after "Answer:"\.?\s*$'
)
_NO_ANSWERS = {"proof", "notfound", "not found", "none", "n/a"}


def gsm8k(row: Row) -> Draft:
    """GSM8K: what follows #### is the answer, what precedes it the trace, without the calculator's <<2+2=4>>."""
    steps, _, answer = row["answer"].rpartition("####")
    trace = _CALCULATOR.sub("", steps).strip()
    return Draft(row["question"], answer.strip() or None, responses=(Response(trace or None, None),))


def boxed(row: Row) -> Draft:
    """MATH, Minerva, NuminaMath-CoT: the answer is the last box of the solution."""
    solution = as_text(row["solution"])
    return Draft(
        row["problem"],
        None,
        boxed=solution,
        responses=() if solution is None else (Response(None, solution),),
        id=as_text(row.get("id", row.get("idx"))),
        source=as_text(row.get("source")),
    )


def answered(row: Row) -> Draft:
    """MATH-500, NuminaMath-1.5, AIME, AMC and Minerva: an answer, and sometimes a solution."""
    if row.get("problem_is_valid") not in (None, "Yes") or row.get("solution_is_valid") not in (None, "Yes"):
        raise LeftOut(Reason.MARKED_INVALID)
    given = {column.lower(): value for column, value in row.items()}
    answer = as_text(given["answer"] if "answer" in given else given["expected_answer"])
    solution = _first(given, "solution", "reference_solution")
    if answer is not None and answer.casefold() in _NO_ANSWERS:
        raise LeftOut(Reason.NO_ANSWER)
    has_options = row.get("question_type") == "MCQ" and re.fullmatch(r"[A-J]", answer or "")
    return Draft(
        given["problem"] if "problem" in given else given["question"],
        answer,
        boxed=solution,
        responses=() if solution is None or solution == answer else (Response(None, solution),),
        verifier="choice" if has_options else "math",
        id=_first(given, "unique_id", "id", "problem_idx", "idx"),
        source=_first(given, "source"),
    )


def olympiadbench(row: Row) -> Draft:
    """OlympiadBench: the final answers in a list; the context comes before the question."""
    images = [value for column, value in row.items() if column.startswith("image") and value]
    if images or row.get("modality") == "Multimodal":
        raise LeftOut(Reason.NEEDS_IMAGE)
    final = row["final_answer"]
    answer = as_text([each.strip().strip("$") for each in final] if isinstance(final, list) else final)
    context = as_text(row.get("context"))
    question = row["question"] if context is None else f"{context}\n\n{row['question']}"
    solutions = row["solution"] if isinstance(row["solution"], list) else [row["solution"]]
    responses = tuple(Response(None, text) for each in solutions if (text := as_text(each)) is not None)
    return Draft(question, answer, responses=responses, id=as_text(row.get("id")))


def dapo(row: Row) -> Draft:
    """DAPO-Math-17k and other sets in verl's form; the line that asks for a form of the answer is not kept."""
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else next(each["content"] for each in prompt if each["role"] == "user")
    extra = row.get("extra_info") or {}
    return Draft(
        _DAPO.sub("", _DAPO.sub("", text)),
        as_text(row["reward_model"]["ground_truth"]),
        id=as_text(extra.get("index")),
        source=as_text(row.get("data_source")),
    )


def _first(row: Row, *columns: str) -> str | None:
    return next((text for column in columns if (text := as_text(row.get(column))) is not None), None)


def _is_gsm8k(row: Row) -> bool:
    return "####" in str(row["answer"])


_ABOUT = columns(
    "id, ID, idx, index, uuid, url, link, source, data_source, year, Year, exam, competition, contest, test, split, "
    "problem_idx, problem_number, question_number, Problem Number, Part, type, problem_type, subject, topic, domain, "
    "data_topic, subfield, level, difficulty, lang, language, license, tags, metadata, extra_info"
)
"""Columns that tell where a question is from. With other ones, such as options, a row may not be what it seems."""


def _competition(question: str, answer: str, *optional: str) -> Layout:
    """One of the forms in which AIME, AMC and Minerva are published: the same but for the names of columns."""
    return Layout(
        ("competition", "aime24", "aime25", "amc", "amc23", "minerva"),
        frozenset({question, answer}),
        answered,
        _ABOUT | frozenset(optional),
        looks_right=lambda row: "####" not in str(row[answer]),
    )


LAYOUTS = (
    Layout(("gsm8k",), columns("question, answer"), gsm8k, _ABOUT, looks_right=_is_gsm8k),
    Layout(("math",), columns("problem, level, type, solution"), boxed, _ABOUT),
    Layout(
        ("math500",),
        columns("problem, solution, answer, subject, level"),
        answered,
        _ABOUT | {"unique_id"},
    ),
    Layout(("minerva",), columns("problem, solution, idx"), boxed, columns("type")),
    Layout(("competition", "aime24"), columns("problem, solution, id, url"), boxed, columns("year")),
    _competition("problem", "answer", "solution", "question"),
    _competition("problem", "expected_answer", "reference_solution"),
    _competition("question", "answer"),
    _competition("Problem", "Answer", "Solution"),
    _competition("Question", "Answer"),
    Layout(("numinamath_cot",), columns("source, problem, solution"), boxed, columns("messages")),
    Layout(
        ("numinamath_1.5",),
        columns("problem, solution, answer, problem_type, question_type, source"),
        answered,
        columns("problem_is_valid, solution_is_valid, synthetic"),
    ),
    Layout(("olympiadbench",), columns("question, solution, final_answer"), olympiadbench, takes_others=True),
    Layout(
        ("dapo_17k",),
        columns("prompt, reward_model"),
        dapo,
        columns("data_source, ability, extra_info, solution, source_prompt"),
    ),
)
