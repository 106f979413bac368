"""What a published layout is, and how the layout of a file is found.

A layout turns one row of a published data set into a `Draft`. Drafts are judged, compared with others and written by
the stage (`stages/import_questions.py`).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megavar.data.importers.files import Row

IGNORED_COLUMNS = frozenset({"__index_level_0__", "Unnamed: 0", "", "split"})
"""What tools add to a table."""
Markers = tuple[str, str]
"""Before and behind a trace."""
THOUGHT_MARKERS: tuple[Markers, ...] = (("<|begin_of_thought|>", "<|end_of_thought|>"), ("<think>", "</think>"))
_SOLUTION_MARKERS = re.compile(r"<\|(?:begin|end)_of_solution\|>")


class Reason(StrEnum):
    """Why a row is left out."""

    NO_ANSWER = "no answer"
    UNREADABLE_ROW = "unreadable row"
    """A column holds another kind of value than the layout's, or text that is no Unicode."""
    UNREADABLE_ANSWER = "unreadable answer"
    """The verifier can compare nothing with it."""
    NOT_JUDGED = "not judged in time"
    CONTRADICTION = "contradiction"
    """The published solution, or every generation, is wrong by the published answer."""
    UNFINISHED_TRACE = "unfinished trace"
    NEEDS_IMAGE = "needs an image"
    MARKED_INVALID = "marked invalid"
    """By who published it."""
    DUPLICATE = "duplicate question"
    OVERLAP = "overlap with --exclude"
    LONG_TRACE = "trace too long"


class LeftOut(Exception):
    """A row that cannot become a question."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Response:
    """One published way to the answer."""

    trace: str | None
    solution: str | None
    """The text after the trace; None: `answer` as templates render it."""


@dataclass(frozen=True)
class Draft:
    """A question as a layout makes it of a row."""

    question: str
    answer: str | None
    """None: what the last box of `boxed` holds."""
    partial_answer: str | None = None
    """What is left of an answer that the verifier cannot read; such questions are counted."""
    boxed: str | None = None
    responses: tuple[Response, ...] = ()
    """The first that the verifier accepts is taken."""
    verifier: str = "math"
    id: str | None = None
    """As published; None: made of the question."""
    source: str | None = None
    """None: the name of the layout."""
    may_be_unverifiable: bool = False
    """Without an answer it is kept with the verifier `none`, and its solution as the answer."""


@dataclass(frozen=True)
class Layout:
    """The columns of a published data set, and what becomes of a row."""

    names: tuple[str, ...]
    required: frozenset[str]
    convert: Callable[[Row], Draft]
    """Raises `LeftOut`; a KeyError, TypeError or ValueError means an unreadable row."""
    optional: frozenset[str] = frozenset()
    """Columns that may be missing, or are not used."""
    takes_others: bool = False
    """Any other columns may be there too."""
    looks_right: Callable[[Row], bool] = field(default=lambda row: True)
    """Tells data sets with the same columns apart by the first row."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def fits(self, row: Row) -> bool:
        """Whether a first row is of this layout."""
        found = row.keys() - IGNORED_COLUMNS
        if not self.required <= found or not (self.takes_others or found <= self.required | self.optional):
            return False
        return self.looks_right(row)


def columns(names: str) -> frozenset[str]:
    """Names that are separated by commas."""
    return frozenset(names.split(", "))


def find_layout(row: Row, layouts: Iterable[Layout], where: str) -> Layout:
    """The layout that a first row is of: of those that fit the one with the most columns of its own.

    Args:
        where: the file, for the message.

    Raises:
        ValueError: if none or several fit, with the columns found and what they could be.
    """
    fitting = [layout for layout in layouts if layout.fits(row)]
    best = [one for one in fitting if not any(one.required < other.required for other in fitting)]
    if len(best) == 1:
        return best[0]
    found = ", ".join(row)
    if best:
        names = ", ".join(layout.name for layout in best)
        raise ValueError(f"{where} could be of the layouts {names}: its columns are {found}; choose with --layout.")
    having = [layout for layout in layouts if layout.required <= row.keys() and layout.looks_right(row)]
    near = dict.fromkeys(one.name for one in having if not any(one.required < other.required for other in having))
    could_be = (
        f" They include those of {' and '.join(near)}: --layout {next(iter(near))} takes it as that." if near else ""
    )
    raise ValueError(
        f"{where} has the columns {found}, which are those of no known layout.{could_be} Say which is which with "
        "--map question=COLUMN,answer=COLUMN,..."
    )


def named_layout(name: str, layouts: Sequence[Layout], row: Row, where: str) -> Layout:
    """The layout that a user names, in the form that fits a first row.

    Raises:
        ValueError: if there is none of this name, or the row lacks its columns.
    """
    known = [layout for layout in layouts if name in layout.names]
    if not known:
        names = ", ".join(dict.fromkeys(each for layout in layouts for each in layout.names))
        raise ValueError(f"--layout {name} is unknown; known are {names}.")
    having = [layout for layout in known if layout.required <= row.keys()]
    if not having:
        needed = "; or ".join(", ".join(sorted(layout.required)) for layout in known)
        raise ValueError(f"{where} has the columns {', '.join(row)}; the layout {name} needs {needed}.")
    return max(having, key=lambda layout: len(layout.required))


MAPPED = ("id", "question", "answer", "solution", "trace", "verifier", "source")


def mapped_layout(column_of: Mapping[str, str], markers: Markers | None) -> Layout:
    """A layout of the user's: field of a question -> column, or `column.key` inside an object.

    Without an `answer` it is the last box of the solution; without a `trace` the solution is split at its markers.

    Args:
        markers: before and behind a trace; None: the usual ones.

    Raises:
        ValueError: if a field is unknown, or neither `answer` nor `solution` is given.
    """
    unknown = sorted(column_of.keys() - set(MAPPED))
    if unknown or "question" not in column_of or not column_of.keys() & {"answer", "solution"}:
        wrong = f"has the unknown field {unknown[0]}" if unknown else "needs question, and answer or solution"
        raise ValueError(f"--map {wrong}; give FIELD=COLUMN,... with the fields {', '.join(MAPPED)}.")

    def convert(row: Row) -> Draft:
        given = {name: as_text(_inside(row, column)) for name, column in column_of.items()}
        whole = given.get("solution")
        response = Response(None, None) if whole is None else split_trace(whole, markers)
        if given.get("trace") is not None:
            response = Response(given["trace"], response.solution)
        return Draft(
            question=given["question"] or "",
            answer=given.get("answer"),
            boxed=whole,
            responses=() if response == Response(None, None) else (response,),
            verifier=given.get("verifier") or "math",
            id=given.get("id"),
            source=given.get("source"),
        )

    return Layout(("mapped",), frozenset(column.split(".")[0] for column in column_of.values()), convert)


def _inside(row: Row, column: str) -> Any:
    if column in row:
        return row[column]
    first, *keys = column.split(".")
    value = row[first]
    for key in keys:
        value = None if value is None else value[key]
    return value


def as_text(value: Any) -> str | None:
    """A value as text: 142.0 is 142, a list its elements with commas; None if there is nothing in it."""
    if value is None or isinstance(value, str):
        return value.strip() or None if value else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value))) or None
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def split_trace(text: str, markers: Markers | None = None) -> Response:
    """A generation in its trace and what follows; without markers all of it is the solution.

    The marker before the trace may be missing: a prompt often ends with it.

    Raises:
        LeftOut: if the trace does not end, or begins twice.
    """
    for opening, closing in THOUGHT_MARKERS if markers is None else (markers,):
        before, found, after = text.partition(closing)
        if found:
            trace = before.partition(opening)[2] if opening in before else before
            if opening in trace or opening in after or closing in after:
                raise LeftOut(Reason.UNFINISHED_TRACE)
            return Response(trace.strip() or None, _SOLUTION_MARKERS.sub("", after).strip() or None)
        if opening in text:
            raise LeftOut(Reason.UNFINISHED_TRACE)
    return Response(None, _SOLUTION_MARKERS.sub("", text).strip() or None)


def finished(generations: Iterable[str], markers: Markers | None = None) -> tuple[Response, ...]:
    """The generations whose traces end.

    Raises:
        LeftOut: if there are some, and the trace of none ends.
    """
    found: list[Response] = []
    unfinished = False
    for text in generations:
        try:
            found.append(split_trace(text, markers))
        except LeftOut:
            unfinished = True
    if unfinished and not found:
        raise LeftOut(Reason.UNFINISHED_TRACE)
    return tuple(found)
