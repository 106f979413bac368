"""Layouts of published data sets, each an entry with its columns and a function of a row (docs/data.md)."""

from dataclasses import fields

from megavar.data.importers import choices, countdown, mathematics, programs, reasoning
from megavar.data.importers.files import Row
from megavar.data.importers.layout import Draft, Layout, Response, as_text, columns
from megavar.records import Question


def _own(row: Row) -> Draft:
    """A question file of this package."""
    trace, solution = as_text(row.get("trace")), as_text(row.get("solution"))
    return Draft(
        row["question"],
        as_text(row["answer"]),
        responses=() if trace is None and solution is None else (Response(trace, solution),),
        verifier=as_text(row.get("verifier")) or "math",
        id=as_text(row["id"]),
        source=as_text(row.get("source")),
    )


OWN = Layout(
    ("questions",),
    columns("id, question, answer"),
    _own,
    frozenset(item.name for item in fields(Question)),
)
LAYOUTS: tuple[Layout, ...] = (
    OWN,
    *reasoning.LAYOUTS,
    *mathematics.LAYOUTS,
    *choices.LAYOUTS,
    *countdown.LAYOUTS,
    *programs.LAYOUTS,
)
