"""Makes a question file of published data sets (docs/data.md).

Rows are read one by one, turned into drafts by their layout (`data/importers/`), judged by their own verifiers in the
pool, and written in their order. Memory holds the rows that are being judged, and of the others a few bytes each.
"""

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import orjson
from rich.console import Console
from rich.table import Table

from megavar.config.schema import TemplateConfig, VerifyConfig
from megavar.data.decode import open_tokenizer
from megavar.data.importers import LAYOUTS
from megavar.data.importers.files import Row, read_file
from megavar.data.importers.layout import (
    Draft,
    Layout,
    LeftOut,
    Markers,
    Reason,
    Response,
    find_layout,
    mapped_layout,
    named_layout,
)  # fmt: skip
from megavar.data.overlap import Overlap, normalised
from megavar.data.templates import reference_solution
from megavar.disk import atomic_write, make_folder
from megavar.progress import ProgressLine
from megavar.records import Question, Verdict
from megavar.stages.references import is_accepted, misplaced
from megavar.verifiers import NO_VERIFIER, check_verifiers, get_verifier, ground_truth
from megavar.verifiers.final_answer import last_box
from megavar.verifiers.pool import VerifyJob, verify_all

logger = logging.getLogger(__name__)

MOST_WAITING_ROWS, MOST_WAITING_CHARACTERS = 1024, 2**26
"""Rows that are read, or whose verdicts wait for that of an earlier row."""
_AT_ONCE = 64
"""Rows that are written, and tokenized, at once."""
_DIGITS = 16
"""Of the digest of a question, which is its id where none is published."""
_COLUMNS = [item.name for item in fields(Question)]


@dataclass(frozen=True)
class ImportSettings:
    """What is read and what is left out."""

    layout: str | None = None
    """None: found by the columns of each file."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of a question -> column, for a layout that nobody knows."""
    markers: Markers | None = None
    """Before and behind a trace, in such a layout."""
    exclude: Sequence[Path] = ()
    """Files of held-out questions, in any layout."""
    max_trace_tokens: int | None = None
    """Longer traces are left out."""
    model: Path | None = None
    """Folder whose tokenizer counts them."""


@dataclass
class _Candidate:
    """A row on its way to a question."""

    file: Path
    number: int
    row: Row
    question: Question | None = None
    """None: left out before it was judged."""
    key: bytes = b""
    """Of the normalised question."""
    partial_answer: str | None = None
    """None: there is none, or it is the question's."""
    is_partial: bool = False
    responses: tuple[Response, ...] = ()
    verdicts: list[str] = field(default_factory=list)
    """Of the responses, and last of the answer alone."""
    reason: Reason | None = None
    detail: str = ""
    is_settled: bool = False

    @property
    def characters(self) -> int:
        return sum(len(text or "") for each in self.responses for text in (each.trace, each.solution)) + (
            0 if self.question is None else len(self.question.question) + len(self.question.answer)
        )

    def leave_out(self, reason: Reason, detail: str = "") -> None:
        self.reason, self.detail, self.is_settled = reason, detail, True


def import_questions(files: Sequence[Path], target: Path, settings: ImportSettings) -> None:
    """Write the questions of published files, and beside them `.rejected.jsonl` with every row that is left out.

    Args:
        target: a `.jsonl` file, replaced when everything is done. The rejected rows are `target` with
            `.rejected.jsonl` instead of its suffix.

    Raises:
        ValueError: if a file is damaged or of no known layout, nothing is left, or settings do not go together.
    """
    _check(files, target, settings)
    held_out = Overlap(_held_out(settings))
    rejected = target.with_suffix(".rejected.jsonl")
    make_folder(target.parent)
    with ExitStack() as stack:
        kept_to = stack.enter_context(atomic_write(target))
        with atomic_write(rejected) as rejected_to, kept_to.open("wb") as kept, rejected_to.open("wb") as left_out:
            progress = stack.enter_context(ProgressLine("import"))
            writer = _Writer(kept, left_out, settings, progress)
            judge = _Judge(_candidates(files, settings, held_out, writer), writer)
            verify_all(judge, len(os.sched_getaffinity(0)), VerifyConfig().timeout_seconds, judge.on_verdict)
            writer.finish()
        writer.print_table(target, rejected)
        if not writer.counts[None]:
            raise ValueError(f"no row became a question, and {target} was not written; {rejected} says why.")


def _check(files: Sequence[Path], target: Path, settings: ImportSettings) -> None:
    if target.suffix != ".jsonl":
        raise ValueError(f"--out {target}: questions are written as JSON lines; give a name that ends in .jsonl.")
    if target.resolve() in {file.resolve() for file in (*files, *settings.exclude)}:
        raise ValueError(f"--out {target} is one of the files that are read; give another name.")
    if (settings.max_trace_tokens is None) != (settings.model is None):
        raise ValueError("--max-trace-tokens and --model go together: the model's tokenizer counts the tokens.")
    if settings.max_trace_tokens is not None and settings.max_trace_tokens < 1:
        raise ValueError(f"--max-trace-tokens={settings.max_trace_tokens} must be at least 1.")
    if settings.layout is not None and settings.columns:
        raise ValueError("--layout and --map are two ways to say what the columns are; give one of them.")
    if settings.markers is not None and not settings.columns:
        raise ValueError("--trace-markers belong to --map; a known layout has its own.")


def _held_out(settings: ImportSettings) -> Iterator[str]:
    """The questions of `exclude`, also of rows without a usable answer."""
    for file in settings.exclude:
        num_unreadable = 0
        for _, row, layout in _rows(file, ImportSettings()):
            try:
                yield layout.convert(row).question
            except (LeftOut, LookupError, TypeError, ValueError, AttributeError, StopIteration):
                num_unreadable += 1
        if num_unreadable:
            logger.warning("import: %d rows of %s are no questions, and exclude nothing.", num_unreadable, file)


def _rows(file: Path, settings: ImportSettings) -> Iterator[tuple[int, Row, Layout]]:
    layout = None
    for number, row in read_file(file):
        if layout is None:
            layout = _layout_of(file, row, settings)
            logger.info("%s: layout %s", file, layout.name)
        if not layout.required <= row.keys():
            missing = ", ".join(sorted(layout.required - row.keys()))
            raise ValueError(
                f"{file}, row {number} lacks the columns {missing} of the layout {layout.name}, which the first row "
                f"has; it has {', '.join(row)}. Import files of different layouts apart."
            )
        yield number, row, layout


def _layout_of(file: Path, row: Row, settings: ImportSettings) -> Layout:
    if settings.columns:
        layout = mapped_layout(settings.columns, settings.markers)
        if not layout.required <= row.keys():
            missing = ", ".join(sorted(layout.required - row.keys()))
            raise ValueError(f"--map names {missing}, but {file} has the columns {', '.join(row)}.")
        return layout
    if settings.layout is not None:
        return named_layout(settings.layout, LAYOUTS, row, str(file))
    return find_layout(row, LAYOUTS, str(file))


def _candidates(
    files: Sequence[Path], settings: ImportSettings, held_out: Overlap, writer: "_Writer"
) -> Iterator[_Candidate]:
    known: set[str] = {NO_VERIFIER}
    for file in files:
        for number, row, layout in _rows(file, settings):
            found = _Candidate(file, number, row)
            try:
                _prepare(found, layout.convert(row), settings.layout or layout.name)
                if found.key in writer.keys:
                    raise LeftOut(Reason.DUPLICATE)
                if found.question is not None and found.question.question in held_out:
                    raise LeftOut(Reason.OVERLAP)
            except LeftOut as left:
                found.leave_out(left.reason, left.detail)
            except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
                found.leave_out(Reason.UNREADABLE_ROW, f"{type(error).__name__}: {error}"[:300])
            verifier = NO_VERIFIER if found.question is None else found.question.verifier
            if verifier not in known:
                check_verifiers([verifier])
                known.add(verifier)
            yield found


def _prepare(found: _Candidate, draft: Draft, layout: str) -> None:
    """Set the question that is judged, without its trace and solution, and the responses that are tried.

    Raises:
        LeftOut: if it has no answer, or one that nothing can be compared with.
    """
    text = draft.question.strip()
    if not text:
        raise LeftOut(Reason.UNREADABLE_ROW, "the question is empty")
    for each in draft.responses:
        "".join(filter(None, (each.trace, each.solution))).encode()  # half of a surrogate pair is no text
    answer, verifier = draft.answer, draft.verifier
    if answer is None and draft.boxed is not None:
        answer = last_box(draft.boxed)
    elif answer is not None and "\\boxed" in answer and verifier != "code":
        answer = last_box(answer) or answer
    found.key = hashlib.blake2b(normalised(text).encode(), digest_size=_DIGITS // 2).digest()
    id = f"{layout}-{draft.id or found.key.hex()}" if layout != "questions" or draft.id is None else draft.id
    source = draft.source or layout
    question = Question(id, text, (answer or "").strip(), verifier=verifier, source=source)
    problem = misplaced(question) if question.answer and verifier != NO_VERIFIER else None
    if draft.may_be_unverifiable and (problem is not None or not question.answer):
        whole = draft.boxed or next((each.solution for each in draft.responses if each.solution), "")
        question, problem = Question(id, text, whole.strip(), verifier=NO_VERIFIER, source=source), None
    if not question.answer:
        raise LeftOut(Reason.NO_ANSWER)
    if problem is not None:
        raise LeftOut(Reason.UNREADABLE_ANSWER, problem[1])
    question.answer.encode()
    found.question, found.responses, found.partial_answer = question, draft.responses, draft.partial_answer
    if question.verifier == NO_VERIFIER:
        _take(found, draft.responses[0] if draft.responses else Response(None, None))


def _take(found: _Candidate, response: Response) -> None:
    question = found.question
    assert question is not None, found
    found.question = replace(question, solution=response.solution, trace=response.trace)
    found.is_settled = True


def _settle(found: _Candidate, verdict: str) -> None:
    """Note a verdict; the row is settled by the first accepted response, or by the verdict on the answer alone."""
    question, tried = found.question, len(found.verdicts)
    assert question is not None, found
    found.verdicts.append(verdict)
    if tried < len(found.responses):
        if verdict == Verdict.CORRECT:
            _take(found, found.responses[tried])
        return
    if Verdict.TIMEOUT in found.verdicts:
        found.leave_out(Reason.NOT_JUDGED)
    elif not is_accepted(question, verdict) and found.partial_answer is not None:
        found.question = replace(question, answer=found.partial_answer)
        found.partial_answer, found.is_partial, found.verdicts = None, True, []
    elif not is_accepted(question, verdict):
        found.leave_out(
            Reason.UNREADABLE_ANSWER, f"the verifier {question.verifier}: {verdict.removeprefix('error: ')}"
        )
    elif any(_states_an_answer(response, question.verifier) for response in found.responses):
        found.leave_out(
            Reason.CONTRADICTION, f"`answer` is {question.answer!r:.80}; verdicts: {', '.join(found.verdicts[:-1])}"
        )
    else:
        _take(found, Response(None, None))


def _states_an_answer(response: Response, verifier: str) -> bool:
    """Whether a response that is not accepted is wrong, and not just a text without its answer at the end."""
    return response.trace is not None or verifier == "code" or "\\boxed" in (response.solution or "")


def _next_job(found: _Candidate) -> VerifyJob:
    question, tried = found.question, len(found.verdicts)
    assert question is not None, found
    text = None
    if tried < len(found.responses):
        response = found.responses[tried]
        boxed_trace = response.trace if response.trace and "\\boxed" in response.trace else None
        text = response.solution or boxed_trace
    if text is None:
        text = reference_solution(question, TemplateConfig().solution)
    return VerifyJob(get_verifier(question.verifier), text, ground_truth(question))


class _Judge:
    """The jobs of the pool: the next response of a row after a verdict, or else the next row.

    While too much waits for an early row it says that there are no more jobs, until there is room again.
    """

    def __init__(self, candidates: Iterator[_Candidate], writer: "_Writer") -> None:
        self._candidates, self._writer = candidates, writer
        self._waiting: deque[_Candidate] = deque()
        self._characters = 0
        self._again: deque[_Candidate] = deque()
        self._asked: dict[int, _Candidate] = {}
        self._num_jobs = 0

    def __iter__(self) -> "_Judge":
        return self

    def __next__(self) -> VerifyJob:
        found = self._again.popleft() if self._again else self._read()
        self._asked[self._num_jobs] = found
        self._num_jobs += 1
        return _next_job(found)

    def _read(self) -> _Candidate:
        while len(self._waiting) < MOST_WAITING_ROWS and self._characters < MOST_WAITING_CHARACTERS:
            found = next(self._candidates)
            self._waiting.append(found)
            self._characters += found.characters
            if not found.is_settled:
                return found
            self._write()
        raise StopIteration

    def on_verdict(self, index: int, verdict: str) -> None:
        """Take the verdict of a job."""
        found = self._asked.pop(index)
        _settle(found, verdict)
        if found.is_settled:
            self._write()
        else:
            self._again.append(found)

    def _write(self) -> None:
        while self._waiting and self._waiting[0].is_settled:
            found = self._waiting.popleft()
            self._characters -= found.characters
            self._writer.add(found)


class _Writer:
    """Writes settled rows in their order, and counts them.

    Attributes:
        keys: of the questions that are kept.
        counts: reason -> rows; None: kept.
        num_partial: kept with a part of their answers.
    """

    def __init__(self, kept: IO[bytes], left_out: IO[bytes], settings: ImportSettings, progress: ProgressLine) -> None:
        self._kept, self._left_out, self._progress = kept, left_out, progress
        self._limit = settings.max_trace_tokens
        self._tokenizer = None if settings.model is None else open_tokenizer(settings.model)
        self._pending: list[_Candidate] = []
        self._ids: set[str] = set()
        self.keys: set[bytes] = set()
        self.counts: Counter[Reason | None] = Counter()
        self.num_partial = 0

    def add(self, found: _Candidate) -> None:
        """Write a row, now or with the next ones."""
        self._pending.append(found)
        if len(self._pending) == _AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Write what waits."""
        too_long = self._too_long()
        for index, found in enumerate(self._pending):
            if found.reason is None and found.key in self.keys:
                found.leave_out(Reason.DUPLICATE)
            elif found.reason is None and index in too_long:
                found.leave_out(Reason.LONG_TRACE, f"{too_long[index]} tokens")
            self.counts[found.reason] += 1
            if found.reason is None:
                self.keys.add(found.key)
                self.num_partial += found.is_partial
                self._keep(found)
            else:
                self._reject(found)
        self._pending = []
        self._progress.update(self.counts.total(), None, "rows")

    def _too_long(self) -> dict[int, int]:
        """Pending row -> tokens of its trace, if these are more than the limit."""
        if self._tokenizer is None or self._limit is None:
            return {}
        traces = {
            index: found.question.trace
            for index, found in enumerate(self._pending)
            if found.reason is None and found.question is not None and found.question.trace is not None
        }
        # No token is less than a byte, of which Unicode's normalisation makes at most three of one.
        unsure = {
            index: text
            for index, text in traces.items()
            if len(text) > self._limit or (not text.isascii() and 3 * len(text.encode()) > self._limit)
        }
        encoded = self._tokenizer.encode_batch_fast(list(unsure.values()), add_special_tokens=False)
        lengths = {index: len(each.ids) for index, each in zip(unsure, encoded, strict=True)}
        return {index: length for index, length in lengths.items() if length > self._limit}

    def _keep(self, found: _Candidate) -> None:
        question = found.question
        assert question is not None, found
        row = {name: value for name in _COLUMNS if (value := getattr(question, name)) is not None}
        if question.id in self._ids:  # two data sets, or two parts of one, count from the same number
            row["id"] = f"{question.id}-{found.key.hex()}"
        self._ids.add(row["id"])
        self._kept.write(orjson.dumps(row) + b"\n")

    def _reject(self, found: _Candidate) -> None:
        row = {"reason": found.reason, "detail": found.detail, "file": str(found.file), "row": found.number}
        self._left_out.write(_as_json({**row, "source_row": found.row}) + b"\n")

    def print_table(self, target: Path, rejected: Path) -> None:
        """Print how many rows were read, kept, and left out for each reason."""
        table = Table("rows", "", box=None)
        table.add_row("read", f"{self.counts.total():,}")
        table.add_row("kept", f"{self.counts[None]:,}")
        if self.num_partial:
            table.add_row("  of these with public tests alone (private ones unreadable)", f"{self.num_partial:,}")
        for reason in Reason:
            if self.counts[reason]:
                table.add_row(f"left out: {reason}", f"{self.counts[reason]:,}")
        table.columns[1].justify = "right"
        Console().print(table)
        print(
            f"{target}: {self.counts[None]:,} questions; {rejected}: {self.counts.total() - self.counts[None]:,} rows"
        )


def _as_json(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=_described)
    except TypeError:  # integers of more than 64 bits, half of a surrogate pair
        return json.dumps(row, default=_described).encode()


def _described(value: Any) -> str:
    """What JSON has no form for: an image, say."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
