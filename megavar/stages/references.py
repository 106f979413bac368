"""Judges the reference answers of a question file by their own verifiers, before anything is learnt from them.

A verifier that does not accept what the data calls right rewards the wrong answers, and no curve shows it.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from megavar.checksums import file_digest
from megavar.config.schema import VerifyConfig
from megavar.data.templates import reference_solution
from megavar.disk import atomic_write
from megavar.progress import ProgressLine
from megavar.ranks import ExplainedFailure
from megavar.records import Question, Verdict
from megavar.verifiers import NO_VERIFIER, VERIFIERS, get_verifier, ground_truth
from megavar.verifiers.notation import normalise, words
from megavar.verifiers.pool import VerifyJob, verify_all

FEW = 5000
"""Questions that are judged in seconds, without a word."""
MOST_WORDS = 10
"""Of an answer in mathematics; a longer one is prose."""
_WHOLE_SOLUTION = re.compile(r"####\s*\S")
_FEW_WORDS = re.compile(r"-?[0-9A-Za-z][0-9A-Za-z.,/]{0,30}|(?=.*[0-9])(?!.*\\hspace)[ -~]{1,31}")
"""What most answers are, which need no closer look: one word, or too short for eleven and with something to compare."""
BadReferences = dict[str, tuple[str, str]]
"""Question id -> (kind, description)."""


def bad_references(
    file: Path, questions: Sequence[Question], config: VerifyConfig, solution_template: str
) -> BadReferences:
    """The questions whose reference answer is not correct by their own verifier, with what is wrong.

    The result is kept in the user's cache folder, under the digest of the file and of the verifiers.

    Args:
        questions: of `file`.
        solution_template: `templates.solution`.

    Raises:
        ValueError: if a verifier is unknown, or exceeds its time limit: the limit is then too low, or the answer
            cannot be judged.
    """
    kept = _cache_file(file, questions, config, solution_template)
    if kept is not None:
        with suppress(OSError, ValueError, TypeError, AttributeError):  # missing, or damaged
            return {question_id: (kind, text) for question_id, (kind, text) in json.loads(kept.read_text()).items()}
    found = _judge(file, questions, config, solution_template)
    if kept is not None:
        with suppress(OSError, ExplainedFailure):  # a cache that cannot be written is none
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as aside:
                aside.write_text(json.dumps(found))
    return found


def _cache_file(file: Path, questions: Sequence[Question], config: VerifyConfig, solution_template: str) -> Path | None:
    """Where the result is kept; None if a verifier is not of this package, whose code may change unseen."""
    if any(question.verifier not in (*VERIFIERS, NO_VERIFIER) for question in questions):
        return None
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for source in (Path(__file__), package / "data" / "templates.py", *sorted((package / "verifiers").glob("*.py"))):
        digest.update(source.read_bytes())
    settings = [file_digest(file), solution_template, config.timeout_seconds]
    settings += [version(name) for name in ("math-verify", "sympy")]
    digest.update(json.dumps(settings).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megavar" / "references" / f"{digest.hexdigest()}.json"


def _judge(file: Path, questions: Sequence[Question], config: VerifyConfig, solution_template: str) -> BadReferences:
    found: BadReferences = {}
    judged: list[Question] = []
    for question in questions:
        if question.verifier == NO_VERIFIER:
            continue
        if (problem := misplaced(question)) is not None:
            found[question.id] = problem
        else:
            judged.append(question)
    jobs = (
        VerifyJob(
            get_verifier(question.verifier, config.plugins),
            reference_solution(question, solution_template),
            ground_truth(question),
        )
        for question in judged
    )
    with ProgressLine("reference answers", show=len(judged) > FEW) as progress:
        num_judged = 0

        def keep(index: int, verdict: str) -> None:
            nonlocal num_judged
            num_judged += 1
            progress.update(num_judged, len(judged), "questions")
            if not is_accepted(judged[index], verdict):
                found[judged[index].id] = _described(judged[index], verdict, config)

        verify_all(jobs, config.num_workers, config.timeout_seconds, keep)
    order = {question.id: index for index, question in enumerate(questions)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def is_accepted(question: Question, verdict: str) -> bool:
    """Whether a verdict on the reference answer is good: tests without a known program need only be readable."""
    has_no_program = question.verifier == "code" and question.solution is None
    return verdict == Verdict.CORRECT or (has_no_program and verdict == Verdict.NO_ANSWER)


def misplaced(question: Question) -> tuple[str, str] | None:
    """What is in the field `answer` and should not be, whatever the verifier says."""
    answer = question.answer
    if question.verifier not in ("math", "choice", "text"):
        return None
    if _WHOLE_SOLUTION.search(answer):
        final = answer.rsplit("####", 1)[1].strip()
        return "whole solutions as answer", (
            f"`answer` holds a whole solution; put {final!r:.80}, which follows the ####, into `answer`, and what "
            "precedes it into `trace`."
        )
    if answer.count("\\boxed") > 1:
        return (
            "answers with several boxes",
            f"`answer` is {answer!r:.80}, with more than one box; give what is in the last.",
        )
    if question.verifier == "text":
        return None
    if _FEW_WORDS.fullmatch(answer):
        return None
    text = normalise(answer)
    if not any(char.isalnum() for char in text):
        return "empty answers", f"`answer` is {answer!r:.80}, which says nothing that a verifier could compare."
    if len(words(text)) > MOST_WORDS:
        return "prose as answer", (
            f"`answer` is prose of {len(words(text))} words, {answer!r:.60}...; give the final answer alone, or the "
            f"verifier {NO_VERIFIER} to a question that cannot be judged."
        )
    return None


def _described(question: Question, verdict: str, config: VerifyConfig) -> tuple[str, str]:
    where = "`solution`" if question.solution is not None else "the answer as templates.solution writes it"
    if verdict == Verdict.TIMEOUT:
        raise ValueError(
            f"question {question.id!r}: the verifier {question.verifier} did not judge the reference answer within "
            f"verify.timeout_seconds={config.timeout_seconds:g}; raise that, or give the question another verifier."
        )
    if verdict == Verdict.WRONG:
        return "not correct by their own verifier", (
            f"{where} is wrong by the verifier {question.verifier} against `answer`={question.answer!r:.80}."
        )
    if verdict == Verdict.NO_ANSWER:
        return "without a final answer", (
            f"the verifier {question.verifier} finds no answer in {where}; `answer` is {question.answer!r:.80}."
        )
    return "not to be judged", f"the verifier {question.verifier} fails with {verdict.removeprefix('error: ')}"
