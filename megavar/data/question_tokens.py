"""The token ids of every question of a file, made once: check, sampling, scoring and training share them.

They are kept in the user's cache folder under the digest of what they were made from, and mapped: a question's tokens
are in memory only while they are used.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megavar.checksums import check_checksums, write_checksums
from megavar.data.templates import Templates
from megavar.progress import ProgressLine
from megavar.records import Question, TokenIds

FEW = 5000
"""Questions that are tokenized in seconds, without a word."""
NO_TEXT = -1
_AT_ONCE = 1024
_KEPT_SECONDS = 30 * 24 * 3600.0
"""After its last use."""


class QuestionTexts(Protocol):
    """Token ids of a question's texts: by rendering them, as `Templates` does, or as they were kept."""

    def policy_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] int32."""
        ...

    def posterior_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] int32."""
        ...

    def trace(self, question: Question) -> TokenIds:
        """[trace tokens] int32."""
        ...

    def answer(self, question: Question) -> TokenIds:
        """[answer tokens] int32."""
        ...


class QuestionTokens:
    """The texts of questions as token ids; see `Templates` for what each is. A kind is made, or mapped, at first use.

    Args:
        on_problem: called with a question whose text cannot be used, and why; such a text has no tokens. None: the
            first is an error.

    Raises:
        ValueError: by the methods; see `on_problem`.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        templates: Templates,
        on_problem: Callable[[Question, str], None] | None = None,
    ) -> None:
        self._questions, self._templates, self._on_problem = questions, templates, on_problem
        self._row_of = {question.id: row for row, question in enumerate(questions)}
        self._kept: dict[str, _Texts] = {}

    def policy_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] int32."""
        return self._text("policy_prompt", question)

    def posterior_prompt(self, question: Question) -> TokenIds:
        """[prompt tokens] int32."""
        return self._text("posterior_prompt", question)

    def trace(self, question: Question) -> TokenIds:
        """[trace tokens] int32.

        Raises:
            ValueError: if the question has no gold trace.
        """
        if question.trace is None:
            raise ValueError(f"question {question.id!r} has no gold trace; use objective.on_no_correct_trace=drop.")
        return self._text("trace", question)

    def answer(self, question: Question) -> TokenIds:
        """[answer tokens] int32."""
        return self._text("answer", question)

    def lengths(self, kind: str) -> NDArray[np.int64]:
        """[questions] tokens of the text that the method `kind` returns; `NO_TEXT`: there is none."""
        return self._texts(kind).lengths

    def _text(self, kind: str, question: Question) -> TokenIds:
        texts, row = self._texts(kind), self._row_of[question.id]
        start = texts.starts[row]
        return texts.ids[start : start + texts.lengths[row]]

    def _texts(self, kind: str) -> "_Texts":
        if kind not in self._kept:
            self._kept[kind] = self._find_or_make(kind)
        return self._kept[kind]

    def _find_or_make(self, kind: str) -> "_Texts":
        folder = _cache_folder() / self._digest(kind)
        with suppress(OSError, ValueError, EOFError):  # missing, or damaged
            return _find(folder)
        # Beside it; or where this process may write, and then the tokens go with the process.
        aside = Path(tempfile.mkdtemp(prefix=".tokens.", dir=_writable(folder.parent)))
        try:
            all_usable = self._make(kind, aside)
            with suppress(OSError):
                if all_usable and aside.parent == folder.parent:
                    write_checksums(aside)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(aside, folder)
                    _remove_unused(folder.parent)
                    return _map(folder)
            return _map(aside)  # whose bytes stay as long as they are mapped
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _digest(self, kind: str) -> str:
        return hashlib.sha256(f"{self._templates.digest(kind)} {self._digest_of_questions}".encode()).hexdigest()

    @cached_property
    def _digest_of_questions(self) -> str:
        digest, names = hashlib.sha256(), [item.name for item in fields(Question)]
        for question in self._questions:
            for text in (getattr(question, name) for name in names):
                digest.update(f"{-1 if text is None else len(text)}:{text}".encode())
        return digest.hexdigest()

    def _make(self, kind: str, folder: Path) -> bool:
        """Write the tokens of one kind; False if a question has none that should."""
        questions, lengths, all_usable = self._questions, np.full(len(self._questions), NO_TEXT, np.int64), True
        show = len(questions) > FEW
        with (folder / "ids.bin").open("wb") as ids, ProgressLine(f"tokens, {kind}", show=show) as progress:
            for start in range(0, len(questions), _AT_ONCE):
                texts, rows = [], []
                for row, question in enumerate(questions[start : start + _AT_ONCE], start):
                    if kind == "trace" and question.trace is None:
                        continue
                    try:
                        texts.append(self._templates.text(kind, question))
                    except ValueError as error:
                        if self._on_problem is None:
                            raise
                        self._on_problem(question, str(error))
                        all_usable = False
                        continue
                    rows.append(row)
                encoded = self._templates.encode(kind, texts)
                lengths[rows] = list(map(len, encoded))
                ids.write(b"".join(some.tobytes() for some in encoded))
                progress.update(min(start + _AT_ONCE, len(questions)), len(questions), "questions")
        np.save(folder / "lengths.npy", lengths)
        return all_usable


@dataclass(frozen=True, eq=False)
class _Texts:
    """One kind of text of all questions: mapped ids, and where each text is in them."""

    ids: TokenIds
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def _find(folder: Path) -> _Texts:
    if not (folder / "lengths.npy").exists():
        raise FileNotFoundError(folder)
    check_checksums(folder)
    os.utime(folder)
    return _map(folder)


def _map(folder: Path) -> _Texts:
    lengths, file = np.load(folder / "lengths.npy"), folder / "ids.bin"
    ids = np.asarray(np.memmap(file, np.int32, "r")) if file.stat().st_size else np.zeros(0, np.int32)
    sizes = np.maximum(lengths, 0)
    return _Texts(ids, np.cumsum(sizes) - sizes, lengths)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megavar" / "tokens"


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _remove_unused(folder: Path) -> None:
    for other in folder.iterdir():
        if time.time() - other.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
