"""Published questions whose answers are programs, with their tests."""

import json
from typing import Any

from megavar.data.importers.files import Row
from megavar.data.importers.layout import Draft, Layout, LeftOut, Reason, Response, as_text, columns

MOST_SOLUTIONS = 5
"""Published programs of a question that are tried."""


def apps(row: Row) -> Draft:
    """APPS and TACO: tests, and programs of which the first that passes them is the solution."""
    tests = row["input_output"]
    answer = tests if isinstance(tests, str) else None if tests is None else json.dumps(tests)
    solutions = _listed(row.get("solutions"))
    if not answer or not solutions:
        raise LeftOut(Reason.NO_ANSWER)
    return Draft(
        with_starter_code(row["question"], row.get("starter_code")),
        answer,
        responses=tuple(Response(None, f"```python\n{text.strip()}\n```") for text in solutions[:MOST_SOLUTIONS]),
        verifier="code",
        id=as_text(row.get("problem_id", row.get("id"))),
        source=as_text(row.get("source")),
    )


def livecodebench(row: Row) -> Draft:
    """LiveCodeBench: public and private tests, or the public ones alone; there is no published program."""
    public = {name: row.get(name) for name in ("public_test_cases", "metadata")}
    tests = public | {"private_test_cases": row.get("private_test_cases")}
    return Draft(
        with_starter_code(row["question_content"], row.get("starter_code")),
        json.dumps(tests, ensure_ascii=False),
        partial_answer=json.dumps(public, ensure_ascii=False),
        verifier="code",
        id=as_text(row.get("question_id")),
        source=as_text(row.get("platform")),
    )


def with_starter_code(question: str, code: Any) -> str:
    """A question, with the lines that the program must begin with."""
    if not isinstance(code, str) or not code.strip():
        return question
    return f"{question.rstrip()}\n\nBegin with this code:\n```python\n{code.rstrip()}\n```"


def _listed(solutions: Any) -> list[str]:
    """Programs, which are published as a list or as its JSON."""
    found = json.loads(solutions) if isinstance(solutions, str) and solutions.strip() else solutions
    return [each for each in found or [] if isinstance(each, str) and each.strip()]


LAYOUTS = (
    *(
        Layout(
            ("apps",),
            columns(f"{id}, question, solutions, input_output"),
            apps,
            columns("difficulty, url, starter_code"),
        )
        for id in ("problem_id", "id")  # of the published loader, and of the file that it reads
    ),
    Layout(
        ("taco",),
        columns("question, solutions, input_output"),
        apps,
        columns(
            "starter_code, difficulty, raw_tags, name, source, tags, skill_types, url, time_limit, date, "
            "picture_num, memory_limit, Expected Auxiliary Space, Expected Time Complexity"
        ),
    ),
    Layout(
        ("livecodebench",),
        columns("question_content, public_test_cases, private_test_cases"),
        livecodebench,
        columns("question_title, platform, question_id, contest_id, contest_date, starter_code, difficulty, metadata"),
    ),
)
